"""Request frames, read strictly: `decode_request`, and `BadFrame` for what is not the protocol.

Promises: `decode_request` raises nothing but `BadFrame`, whatever the bytes. A frame it lets
through has exactly the size that its opcode demands, and every name in it ends where the frame
says: the library behind us, which trusts the kernel, may read it.

Leaves out: bodies that nobody here looks into, beyond their size.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from .wire import (
    BATCH_FORGET_IN,
    COPY_FILE_RANGE_IN,
    CREATE_IN,
    FALLOCATE_IN,
    FORGET_IN,
    FORGET_ONE,
    FSYNC_DATA_ONLY,
    FSYNC_IN,
    GETATTR_SIZE,
    GETXATTR_IN,
    IN_HEADER,
    IN_SIZE,
    INIT_IN,
    INTERRUPT_IN,
    IOCTL_IN,
    LSEEK_IN,
    OPEN_IN,
    POLL_IN,
    POLL_SCHEDULE_NOTIFY,
    READ_IN,
    READ_LOCKOWNER,
    RELEASE_IN,
    SMALL_REPLY,
    UNANSWERED,
    CopyRequest,
    FallocateRequest,
    ForgetRequest,
    Frame,
    FsyncRequest,
    GetattrRequest,
    GetxattrRequest,
    InitFlag,
    InitRequest,
    InterruptRequest,
    IoctlRequest,
    NameRequest,
    Opcode,
    OpenRequest,
    OtherRequest,
    PollRequest,
    ReadRequest,
    ReleaseRequest,
    Request,
    SeekRequest,
    WriteRequest,
)

_Header: TypeAlias = tuple[int, int, int, int, int, int]  # opcode, unique, nodeid, uid, gid, pid
_Decoder: TypeAlias = Callable[[Frame, int, _Header], Request]


class BadFrame(Exception):
    """A frame that is not the protocol.

    ``unique`` is 0 where nobody waits for an answer, or it cannot be known; else the request is
    to be answered with ``errno``: ENOSYS for an opcode that is unknown, EPROTO for a wrong layout.
    """

    def __init__(self, unique: int, errno_: int, reason: str) -> None:
        super().__init__(reason)
        self.unique = unique
        self.errno = errno_
        self.reason = reason


_READLINK_REPLY: Final = 4096


def decode_request(frame: Frame) -> Request:
    """The request that ``frame``, one whole message of the device, carries.

    Raises `BadFrame` for anything that the protocol does not allow.
    """
    size = len(frame)
    if size < IN_SIZE:
        raise BadFrame(0, errno.EPROTO, f"{size} bytes are less than a header")
    length, code, unique, nodeid, uid, gid, pid, _extlen, _pad = IN_HEADER.unpack_from(frame)
    decoder = _DECODERS.get(code)
    owner = 0 if code in UNANSWERED else unique
    if length != size:
        raise BadFrame(owner, errno.EPROTO, f"opcode {code}: {size} bytes that claim {length}")
    if decoder is None:
        raise BadFrame(owner, errno.ENOSYS, f"unknown opcode {code}")
    if unique == 0:
        raise BadFrame(0, errno.EPROTO, f"opcode {code} without a number to answer to")
    return decoder(frame, size, (code, unique, nodeid, uid, gid, pid))


def _bad(header: _Header, reason: str) -> BadFrame:
    code, unique = header[:2]
    owner = 0 if code in UNANSWERED else unique
    return BadFrame(owner, errno.EPROTO, f"{Opcode(code).name}: {reason}")


def _need(size: int, expected: int, header: _Header) -> None:
    if size != IN_SIZE + expected:
        raise _bad(header, f"a body of {size - IN_SIZE} bytes where {expected} belong")


def _need_names(frame: Frame, size: int, fixed: int, count: int, header: _Header) -> list[bytes]:
    """``count`` names, each of at least one byte and its NUL, fill the frame after ``fixed``."""
    raw = bytes(frame[IN_SIZE + fixed : size])
    if size < IN_SIZE + fixed or not raw.endswith(b"\0"):
        raise _bad(header, "a name that does not end")
    names = raw[:-1].split(b"\0")
    if len(names) != count or not all(names):
        raise _bad(header, f"{len(names)} names where {count} belong, or an empty one")
    return names


def _ioctl(frame: Frame, size: int, header: _Header) -> IoctlRequest:
    if size < IN_SIZE + 32:
        raise _bad(header, "shorter than its arguments")
    fh, flags, cmd, arg, in_size, out_size = IOCTL_IN.unpack_from(frame, IN_SIZE)
    if size != IN_SIZE + 32 + in_size:
        raise _bad(header, f"{size - IN_SIZE - 32} bytes of data where {in_size} are announced")
    _, unique, nodeid, uid, gid, pid = header
    data = bytes(frame[IN_SIZE + 32 : size])
    return IoctlRequest(unique, nodeid, uid, gid, pid, fh, flags, cmd, arg, data, out_size)


def _fallocate(frame: Frame, size: int, header: _Header) -> FallocateRequest:
    _need(size, FALLOCATE_IN.size, header)
    fh, offset, length, mode, _pad = FALLOCATE_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    return FallocateRequest(unique, nodeid, uid, gid, pid, fh, offset, length, mode)


def _fsync(frame: Frame, size: int, header: _Header) -> FsyncRequest:
    _need(size, FSYNC_IN.size, header)
    fh, flags, _pad = FSYNC_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    return FsyncRequest(unique, nodeid, uid, gid, pid, fh, bool(flags & FSYNC_DATA_ONLY))


def _read(frame: Frame, size: int, header: _Header) -> ReadRequest:
    _need(size, READ_IN.size, header)
    fh, offset, wanted, flags, _owner, file_flags, _pad = READ_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    cached = not flags & READ_LOCKOWNER
    return ReadRequest(unique, nodeid, uid, gid, pid, fh, offset, wanted, file_flags, cached)


def _write(frame: Frame, size: int, header: _Header) -> WriteRequest:
    if size < IN_SIZE + READ_IN.size:
        raise _bad(header, "shorter than its arguments")
    # struct fuse_write_in is laid out as fuse_read_in.
    fh, offset, length, _wflags, _owner, file_flags, _pad = READ_IN.unpack_from(frame, IN_SIZE)
    _need(size, READ_IN.size + length, header)
    _, unique, nodeid, uid, gid, pid = header
    data = bytes(frame[IN_SIZE + READ_IN.size : size])
    return WriteRequest(unique, nodeid, uid, gid, pid, fh, offset, data, file_flags)


def _seek(frame: Frame, size: int, header: _Header) -> SeekRequest:
    _need(size, LSEEK_IN.size, header)
    fh, offset, whence, _pad = LSEEK_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    return SeekRequest(unique, nodeid, uid, gid, pid, fh, offset, whence)


def _poll(frame: Frame, size: int, header: _Header) -> PollRequest:
    _need(size, POLL_IN.size, header)
    fh, waiter, flags, _events = POLL_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    waits = flags & POLL_SCHEDULE_NOTIFY
    return PollRequest(unique, nodeid, uid, gid, pid, fh, waiter if waits else None)


def _copy(frame: Frame, size: int, header: _Header) -> CopyRequest:
    _need(size, COPY_FILE_RANGE_IN.size, header)
    _, unique, nodeid, uid, gid, pid = header
    arguments = COPY_FILE_RANGE_IN.unpack_from(frame, IN_SIZE)
    return CopyRequest(unique, nodeid, uid, gid, pid, *arguments)


def _open(frame: Frame, size: int, header: _Header) -> OpenRequest:
    _need(size, OPEN_IN.size, header)
    _, unique, nodeid, uid, gid, pid = header
    flags, _ = OPEN_IN.unpack_from(frame, IN_SIZE)
    return OpenRequest(Opcode.OPEN, unique, nodeid, uid, gid, pid, flags)


def _create(frame: Frame, size: int, header: _Header) -> OpenRequest:
    (name,) = _need_names(frame, size, CREATE_IN.size, 1, header)
    _, unique, nodeid, uid, gid, pid = header
    flags, mode, _umask, _ = CREATE_IN.unpack_from(frame, IN_SIZE)
    return OpenRequest(Opcode.CREATE, unique, nodeid, uid, gid, pid, flags, mode, name)


def _name(frame: Frame, size: int, header: _Header) -> NameRequest:
    (name,) = _need_names(frame, size, 0, 1, header)
    code, unique, nodeid, uid, gid, pid = header
    return NameRequest(Opcode(code), unique, nodeid, uid, gid, pid, name)


def _getattr(_frame: Frame, size: int, header: _Header) -> GetattrRequest:
    _need(size, GETATTR_SIZE, header)
    return GetattrRequest(header[1], header[2])


def _forget(frame: Frame, size: int, header: _Header) -> ForgetRequest:
    _need(size, FORGET_IN.size, header)
    _, unique, nodeid = header[:3]
    (count,) = FORGET_IN.unpack_from(frame, IN_SIZE)
    return ForgetRequest(Opcode.FORGET, unique, nodeid, [(nodeid, count)])


def _release(frame: Frame, size: int, header: _Header) -> ReleaseRequest:
    _need(size, RELEASE_IN.size, header)
    return ReleaseRequest(header[1], header[2], RELEASE_IN.unpack_from(frame, IN_SIZE)[0])


def _interrupt(frame: Frame, size: int, header: _Header) -> InterruptRequest:
    _need(size, INTERRUPT_IN.size, header)
    return InterruptRequest(header[1], INTERRUPT_IN.unpack_from(frame, IN_SIZE)[0])


def _init(frame: Frame, size: int, header: _Header) -> InitRequest:
    if size not in (IN_SIZE + 16, IN_SIZE + 64):
        raise _bad(header, f"a body of {size - IN_SIZE} bytes where 16 or 64 belong")
    major, minor, readahead, flags = struct.unpack_from("<IIII", frame, IN_SIZE)
    if flags & InitFlag.INIT_EXT and size == IN_SIZE + 64:
        flags |= INIT_IN.unpack_from(frame, IN_SIZE)[4] << 32
    return InitRequest(header[1], major, minor, readahead, flags)


def _batch_forget(frame: Frame, size: int, header: _Header) -> ForgetRequest:
    if size < IN_SIZE + BATCH_FORGET_IN.size:
        raise _bad(header, "shorter than its arguments")
    count, _pad = BATCH_FORGET_IN.unpack_from(frame, IN_SIZE)
    _need(size, BATCH_FORGET_IN.size + count * FORGET_ONE.size, header)
    body = frame[IN_SIZE + BATCH_FORGET_IN.size : size]
    lookups = list(FORGET_ONE.iter_unpack(body))
    return ForgetRequest(Opcode.BATCH_FORGET, header[1], header[2], lookups)


def _readdir(frame: Frame, size: int, header: _Header) -> OtherRequest:
    _need(size, READ_IN.size, header)
    wanted = READ_IN.unpack_from(frame, IN_SIZE)[2]
    return OtherRequest(Opcode(header[0]), header[1], header[2], wanted)


def _getxattr(frame: Frame, size: int, header: _Header) -> GetxattrRequest:
    _need_names(frame, size, GETXATTR_IN.size, 1, header)
    wanted, _pad = GETXATTR_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    name = bytes(frame[IN_SIZE + GETXATTR_IN.size : size - 1])
    return GetxattrRequest(unique, nodeid, uid, gid, pid, name, wanted)


def _listxattr(frame: Frame, size: int, header: _Header) -> OtherRequest:
    _need(size, GETXATTR_IN.size, header)
    wanted = GETXATTR_IN.unpack_from(frame, IN_SIZE)[0]
    return OtherRequest(Opcode.LISTXATTR, header[1], header[2], max(wanted, SMALL_REPLY))


def _setxattr(frame: Frame, size: int, header: _Header) -> OtherRequest:
    body = bytes(frame[IN_SIZE:size])
    end = body.find(b"\0", GETXATTR_IN.size)
    if end <= GETXATTR_IN.size:
        raise _bad(header, "no name, or one that does not end")
    _need(size, end + 1 + GETXATTR_IN.unpack_from(body)[0], header)
    return OtherRequest(Opcode.SETXATTR, header[1], header[2], SMALL_REPLY)


def _plain(fixed: int, names: int = 0, reply_size: int = SMALL_REPLY) -> _Decoder:
    """A body of ``fixed`` bytes and then ``names`` NUL-terminated names."""
    expected = IN_SIZE + fixed

    def decode(frame: Frame, size: int, header: _Header) -> OtherRequest:
        if names:
            _need_names(frame, size, fixed, names, header)
        elif size != expected:
            _need(size, fixed, header)
        return OtherRequest(Opcode(header[0]), header[1], header[2], reply_size)

    return decode


def _header_only(_frame: Frame, _size: int, header: _Header) -> OtherRequest:
    return OtherRequest(Opcode(header[0]), header[1], header[2], SMALL_REPLY)


_DECODERS: Final[dict[int, _Decoder]] = {
    Opcode.LOOKUP: _name,
    Opcode.FORGET: _forget,
    Opcode.GETATTR: _getattr,
    Opcode.SETATTR: _plain(88),
    Opcode.READLINK: _plain(0, reply_size=_READLINK_REPLY),
    Opcode.SYMLINK: _plain(0, 2),
    Opcode.MKNOD: _plain(16, 1),
    Opcode.MKDIR: _plain(8, 1),
    Opcode.UNLINK: _name,
    Opcode.RMDIR: _plain(0, 1),
    Opcode.RENAME: _plain(8, 2),
    Opcode.LINK: _plain(8, 1),
    Opcode.OPEN: _open,
    Opcode.READ: _read,
    Opcode.WRITE: _write,
    Opcode.STATFS: _plain(0),
    Opcode.RELEASE: _release,
    Opcode.FSYNC: _fsync,
    Opcode.SETXATTR: _setxattr,
    Opcode.GETXATTR: _getxattr,
    Opcode.LISTXATTR: _listxattr,
    Opcode.REMOVEXATTR: _plain(0, 1),
    Opcode.FLUSH: _plain(24),
    Opcode.INIT: _init,
    Opcode.OPENDIR: _plain(OPEN_IN.size),
    Opcode.READDIR: _readdir,
    Opcode.RELEASEDIR: _plain(RELEASE_IN.size),
    Opcode.FSYNCDIR: _plain(16),
    Opcode.GETLK: _plain(48),
    Opcode.SETLK: _plain(48),
    Opcode.SETLKW: _plain(48),
    Opcode.ACCESS: _plain(8),
    Opcode.CREATE: _create,
    Opcode.INTERRUPT: _interrupt,
    Opcode.BMAP: _plain(16),
    Opcode.DESTROY: _plain(0),
    Opcode.IOCTL: _ioctl,
    Opcode.POLL: _poll,
    Opcode.BATCH_FORGET: _batch_forget,
    Opcode.FALLOCATE: _fallocate,
    Opcode.READDIRPLUS: _readdir,
    Opcode.RENAME2: _plain(16, 2),
    Opcode.LSEEK: _seek,
    Opcode.COPY_FILE_RANGE: _copy,
    Opcode.NOTIFY_REPLY: _header_only,
    Opcode.SETUPMAPPING: _header_only,
    Opcode.REMOVEMAPPING: _header_only,
    Opcode.SYNCFS: _header_only,
    Opcode.TMPFILE: _header_only,
    Opcode.STATX: _header_only,
}
