"""The FUSE kernel protocol as values: what a request frame says, and how a reply frame is built.

A *frame* is one message on the FUSE device: a fixed header, then a body whose layout depends on
the opcode. The source of every layout here is the kernel's ``include/uapi/linux/fuse.h``.

Promises:

- `decode_request` raises nothing but `BadFrame`, whatever the bytes. A frame it lets through has
  exactly the size that its opcode demands, and every name in it ends where the frame says.
- `build_reply` makes the only replies there are, so that each is well-formed: its length field is
  its length, and its error is one that the kernel takes.

Leaves out: what a request means (the handlers), the INIT negotiation (`handshake`), and the bodies
of opcodes that only the library behind us answers, beyond their size.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from typing import ClassVar, Final, TypeAlias

import attrs

# -- layouts ------------------------------------------------------------------------------------

IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen (8-byte units), padding."""
OUT_HEADER: Final = struct.Struct("<IiQ")
"""len, error (0 or -errno; a notification's code where unique is 0), unique."""
INIT_IN: Final = struct.Struct("<IIIII")
"""major, minor, max_readahead, flags, flags2; 44 reserved bytes follow since 7.36."""
INIT_OUT: Final = struct.Struct("<IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
max_pages, map_alignment, flags2, max_stack_depth, request_timeout, reserved."""
OPEN_IN: Final = struct.Struct("<II")
CREATE_IN: Final = struct.Struct("<IIII")
OPEN_OUT: Final = struct.Struct("<QIi")
"""fh, open_flags (`OpenReplyFlag`), backing_id."""
ENTRY_OUT_SIZE: Final = 128
RELEASE_IN: Final = struct.Struct("<QIIQ")
READ_IN: Final = struct.Struct("<QQIIQII")
"""fh, offset, size, read_flags, lock_owner, the file's flags, padding. Also READDIR, WRITE."""
GETXATTR_IN: Final = struct.Struct("<II")
IOCTL_IN: Final = struct.Struct("<QIIQII")
"""fh, flags (`IoctlFlag`), cmd, arg, in_size, out_size; in_size bytes follow."""
IOCTL_OUT: Final = struct.Struct("<iIII")
"""result, flags, in_iovs, out_iovs."""
FALLOCATE_IN: Final = struct.Struct("<QQQII")
"""fh, offset, length, mode, padding."""
INTERRUPT_IN: Final = struct.Struct("<Q")
WRITE_OUT: Final = struct.Struct("<II")
"""size, padding"""
FORGET_IN: Final = struct.Struct("<Q")
BATCH_FORGET_IN: Final = struct.Struct("<II")
FORGET_ONE_SIZE: Final = 16
BACKING_MAP: Final = struct.Struct("<iIQ")
"""fd, flags, padding: the argument of FUSE_DEV_IOC_BACKING_OPEN."""

IN_SIZE: Final = IN_HEADER.size
OUT_SIZE: Final = OUT_HEADER.size
MAX_ERRNO: Final = 511
"""The kernel refuses a reply whose error is beyond this (ERESTARTSYS and up are its own)."""
FRAME_BUFFER: Final = (1 << 20) + 8192
"""Bytes that hold any frame: read(2) of the device fails with EINVAL on a buffer smaller than
max_write and its headers, and max_write never exceeds 256 pages."""


class Opcode(IntEnum):
    """What a request asks for. Only these are ever answered with anything but ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52


UNANSWERED: Final = frozenset(
    {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY}
)
"""Opcodes to which no reply is due. (A reply to INTERRUPT means EAGAIN or, for the rest of the
mount's life, "I do not know interrupts".)"""


class InitFlag(IntFlag):
    """Bits of the INIT request and reply; those from 32 up travel in flags2, shifted down."""

    ATOMIC_O_TRUNC = 1 << 3
    WRITEBACK_CACHE = 1 << 16
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class OpenReplyFlag(IntFlag):
    """FOPEN_*: what the kernel is to do with a file that has been opened."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    NONSEEKABLE = 1 << 2
    STREAM = 1 << 4
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class IoctlFlag(IntFlag):
    """FUSE_IOCTL_*: who calls, and on what."""

    COMPAT = 1 << 0
    UNRESTRICTED = 1 << 1
    IS_32BIT = 1 << 3
    DIR = 1 << 4
    COMPAT_X32 = 1 << 5


class NotifyCode(IntEnum):
    """What a frame with unique 0, written by the server, tells the kernel."""

    POLL = 1
    INVAL_INODE = 2
    INVAL_ENTRY = 3
    STORE = 4
    RETRIEVE = 5
    DELETE = 6
    RESEND = 7


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


# -- requests -----------------------------------------------------------------------------------


@attrs.frozen
class IoctlRequest:
    """FUSE_IOCTL, restricted form: sizes come from the command's number (``_IOC_SIZE``).

    ``arg`` is the caller's third argument as a number; ``data`` what the kernel copied from there,
    ``out_size`` how many bytes it will copy back there at most. ``pid`` is the calling thread's id
    (0 if it is not visible from here).
    """

    opcode: ClassVar = Opcode.IOCTL

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    flags: int
    cmd: int
    arg: int
    data: bytes
    out_size: int

    @property
    def is_dir(self) -> bool:
        return bool(self.flags & IoctlFlag.DIR)

    @property
    def is_compat(self) -> bool:
        """The caller is a 32-bit program: pointers and longs in its structs are 4 bytes."""
        return bool(self.flags & (IoctlFlag.COMPAT | IoctlFlag.IS_32BIT))


@attrs.frozen
class FallocateRequest:
    """FUSE_FALLOCATE. ``mode`` holds FALLOC_FL_* bits (fallocate(2)); offset and length in bytes.

    ``length`` may reach beyond what a signed 64-bit offset can name: the kernel checks that only
    for requests that came by fallocate(2).
    """

    opcode: ClassVar = Opcode.FALLOCATE

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    offset: int
    length: int
    mode: int


@attrs.frozen
class ReadRequest:
    """FUSE_READ of at most ``size`` bytes. ``file_flags`` are the open file's, as of this read."""

    opcode: ClassVar = Opcode.READ

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    offset: int
    size: int
    file_flags: int

    @property
    def nonblocking(self) -> bool:
        return bool(self.file_flags & os.O_NONBLOCK)


@attrs.frozen
class WriteRequest:
    """FUSE_WRITE of ``data`` at ``offset``. ``file_flags`` are the open file's, as of this write."""

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    offset: int
    data: bytes
    file_flags: int
    opcode: ClassVar = Opcode.WRITE


@attrs.frozen
class OpenRequest:
    """FUSE_OPEN or FUSE_CREATE; ``flags`` are open(2)'s."""

    opcode: Opcode
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    flags: int

    @property
    def create(self) -> bool:
        return self.opcode is Opcode.CREATE


@attrs.frozen
class ReleaseRequest:
    """FUSE_RELEASE: the last descriptor of an open file has gone. Mappings may live on."""

    opcode: ClassVar = Opcode.RELEASE

    unique: int
    nodeid: int
    fh: int


@attrs.frozen
class InterruptRequest:
    """FUSE_INTERRUPT: the caller of request ``target`` has a signal waiting."""

    opcode: ClassVar = Opcode.INTERRUPT

    unique: int
    target: int


@attrs.frozen
class InitRequest:
    """FUSE_INIT: the kernel's version, and what it offers (`InitFlag` bits, both words in one)."""

    opcode: ClassVar = Opcode.INIT

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int


@attrs.frozen
class OtherRequest:
    """A request of which only the header and the size matter here.

    ``reply_size`` is the most bytes that the kernel takes as the body of its reply.
    """

    opcode: Opcode
    unique: int
    nodeid: int
    reply_size: int


Request: TypeAlias = (
    IoctlRequest
    | FallocateRequest
    | ReadRequest
    | WriteRequest
    | OpenRequest
    | ReleaseRequest
    | InterruptRequest
    | InitRequest
    | OtherRequest
)
Frame: TypeAlias = bytes | bytearray | memoryview
_Header: TypeAlias = tuple[int, int, int, int, int, int]  # opcode, unique, nodeid, uid, gid, pid
_Decoder: TypeAlias = Callable[[Frame, int, _Header], Request]

SMALL_REPLY: Final = 256
"""More than the body of any reply whose size the request does not choose."""
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


def _need_names(frame: Frame, size: int, fixed: int, count: int, header: _Header) -> None:
    """``count`` names, each of at least one byte and its NUL, fill the frame after ``fixed``."""
    raw = bytes(frame[IN_SIZE + fixed : size])
    if size < IN_SIZE + fixed or not raw.endswith(b"\0"):
        raise _bad(header, "a name that does not end")
    names = raw[:-1].split(b"\0")
    if len(names) != count or not all(names):
        raise _bad(header, f"{len(names)} names where {count} belong, or an empty one")


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


def _read(frame: Frame, size: int, header: _Header) -> ReadRequest:
    _need(size, READ_IN.size, header)
    fh, offset, wanted, _rflags, _owner, file_flags, _pad = READ_IN.unpack_from(frame, IN_SIZE)
    _, unique, nodeid, uid, gid, pid = header
    return ReadRequest(unique, nodeid, uid, gid, pid, fh, offset, wanted, file_flags)


def _write(frame: Frame, size: int, header: _Header) -> WriteRequest:
    if size < IN_SIZE + READ_IN.size:
        raise _bad(header, "shorter than its arguments")
    # struct fuse_write_in is laid out as fuse_read_in.
    fh, offset, length, _wflags, _owner, file_flags, _pad = READ_IN.unpack_from(frame, IN_SIZE)
    _need(size, READ_IN.size + length, header)
    _, unique, nodeid, uid, gid, pid = header
    data = bytes(frame[IN_SIZE + READ_IN.size : size])
    return WriteRequest(unique, nodeid, uid, gid, pid, fh, offset, data, file_flags)


def _open(frame: Frame, size: int, header: _Header) -> OpenRequest:
    code, unique, nodeid, uid, gid, pid = header
    if code == Opcode.CREATE:
        _need_names(frame, size, CREATE_IN.size, 1, header)
    else:
        _need(size, OPEN_IN.size, header)
    (flags,) = struct.unpack_from("<I", frame, IN_SIZE)
    return OpenRequest(Opcode(code), unique, nodeid, uid, gid, pid, flags)


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


def _batch_forget(frame: Frame, size: int, header: _Header) -> OtherRequest:
    if size < IN_SIZE + BATCH_FORGET_IN.size:
        raise _bad(header, "shorter than its arguments")
    count, _pad = BATCH_FORGET_IN.unpack_from(frame, IN_SIZE)
    _need(size, BATCH_FORGET_IN.size + count * FORGET_ONE_SIZE, header)
    return OtherRequest(Opcode.BATCH_FORGET, header[1], header[2], 0)


def _readdir(frame: Frame, size: int, header: _Header) -> OtherRequest:
    _need(size, READ_IN.size, header)
    wanted = READ_IN.unpack_from(frame, IN_SIZE)[2]
    return OtherRequest(Opcode(header[0]), header[1], header[2], wanted)


def _xattr_query(frame: Frame, size: int, header: _Header) -> OtherRequest:
    """GETXATTR names an attribute, LISTXATTR does not; size 0 asks only for a length."""
    if header[0] == Opcode.GETXATTR:
        _need_names(frame, size, GETXATTR_IN.size, 1, header)
    else:
        _need(size, GETXATTR_IN.size, header)
    wanted = GETXATTR_IN.unpack_from(frame, IN_SIZE)[0]
    return OtherRequest(Opcode(header[0]), header[1], header[2], max(wanted, SMALL_REPLY))


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
    Opcode.LOOKUP: _plain(0, 1),
    Opcode.FORGET: _plain(FORGET_IN.size, reply_size=0),
    Opcode.GETATTR: _plain(16),
    Opcode.SETATTR: _plain(88),
    Opcode.READLINK: _plain(0, reply_size=_READLINK_REPLY),
    Opcode.SYMLINK: _plain(0, 2),
    Opcode.MKNOD: _plain(16, 1),
    Opcode.MKDIR: _plain(8, 1),
    Opcode.UNLINK: _plain(0, 1),
    Opcode.RMDIR: _plain(0, 1),
    Opcode.RENAME: _plain(8, 2),
    Opcode.LINK: _plain(8, 1),
    Opcode.OPEN: _open,
    Opcode.READ: _read,
    Opcode.WRITE: _write,
    Opcode.STATFS: _plain(0),
    Opcode.RELEASE: _release,
    Opcode.FSYNC: _plain(16),
    Opcode.SETXATTR: _setxattr,
    Opcode.GETXATTR: _xattr_query,
    Opcode.LISTXATTR: _xattr_query,
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
    Opcode.CREATE: _open,
    Opcode.INTERRUPT: _interrupt,
    Opcode.BMAP: _plain(16),
    Opcode.DESTROY: _plain(0),
    Opcode.IOCTL: _ioctl,
    Opcode.POLL: _plain(24),
    Opcode.BATCH_FORGET: _batch_forget,
    Opcode.FALLOCATE: _fallocate,
    Opcode.READDIRPLUS: _readdir,
    Opcode.RENAME2: _plain(16, 2),
    Opcode.LSEEK: _plain(24),
    Opcode.COPY_FILE_RANGE: _plain(56),
    Opcode.NOTIFY_REPLY: _header_only,
    Opcode.SETUPMAPPING: _header_only,
    Opcode.REMOVEMAPPING: _header_only,
    Opcode.SYNCFS: _header_only,
    Opcode.TMPFILE: _header_only,
    Opcode.STATX: _header_only,
}

# -- replies ------------------------------------------------------------------------------------


def build_reply(unique: int, payload: bytes = b"", error: int = 0) -> bytes:
    """A reply frame: ``payload``, or the errno ``error`` alone. Every reply is made here.

    Raises `ValueError` for what the kernel would refuse: unique 0, an errno outside 0..511, or an
    error that comes with a payload.
    """
    if not unique or not 0 <= error <= MAX_ERRNO or (error and payload):
        raise ValueError(f"no reply: unique {unique}, error {error}, {len(payload)} bytes")
    return OUT_HEADER.pack(OUT_SIZE + len(payload), -error, unique) + payload


def build_ioctl_reply(request: IoctlRequest, result: int, data: bytes) -> bytes:
    """The reply to an ioctl: its return value, and what is copied to the caller's buffer.

    Raises `ValueError` if ``data`` is longer than the request takes, or result is no C int.
    """
    if len(data) > request.out_size:
        raise ValueError(f"ioctl {request.cmd:#x} returns {len(data)} of {request.out_size} bytes")
    if not -MAX_ERRNO <= result < 1 << 31:
        raise ValueError(f"ioctl {request.cmd:#x} cannot return {result}")
    return build_reply(request.unique, IOCTL_OUT.pack(result, 0, 0, 0) + data)


def build_request(
    opcode: Opcode, unique: int, nodeid: int, body: bytes, *, uid: int = 0, gid: int = 0
) -> bytes:
    """A request frame, for what the kernel does not say to the library behind us and we must."""
    size = IN_SIZE + len(body)
    return IN_HEADER.pack(size, opcode, unique, nodeid, uid, gid, 0, 0, 0) + body


def decode_reply_header(frame: Frame) -> tuple[int, int] | None:
    """(unique, error as in the frame) of a reply or notification, or None if it is malformed."""
    if len(frame) < OUT_SIZE:
        return None
    length, error, unique = OUT_HEADER.unpack_from(frame)
    return (unique, error) if length == len(frame) else None
