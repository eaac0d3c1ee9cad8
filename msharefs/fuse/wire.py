"""The FUSE kernel protocol as values: opcodes, flags, layouts, requests, and how replies are built.

A *frame* is one message on the FUSE device: a fixed header, then a body whose layout depends on
the opcode. The source of every layout here is the kernel's ``include/uapi/linux/fuse.h``.

Promises: `build_reply` makes the only replies there are, so that each is well-formed: its length
field is its length, and its error is one that the kernel takes.

Leaves out: reading a request frame (`decode`), what a request means (the handlers), the INIT
negotiation (`handshake`), and the bodies that only the library behind us reads.
"""

from __future__ import annotations

import os
import struct
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
FSYNC_DATA_ONLY: Final = 1
READ_LOCKOWNER: Final = 2
"""In read_flags: the owner is given, which read(2) of an uncached file gives and a cache does not."""
NOTIFY_INVAL_INODE: Final = struct.Struct("<Qqq")
"""node, offset, length: what the kernel is to cache no longer."""
GETATTR_SIZE: Final = 16
"""Of struct fuse_getattr_in."""
NOTIFY_INVAL_ENTRY: Final = struct.Struct("<QII")
"""directory, length of the name, flags; the name follows, and a zero byte."""
GETXATTR_IN: Final = struct.Struct("<II")
"""size of the caller's buffer (0: the value's length is asked for), padding; the name follows."""
GETXATTR_OUT: Final = struct.Struct("<II")
"""size, padding: the answer where the length was asked for."""
IOCTL_IN: Final = struct.Struct("<QIIQII")
"""fh, flags (`IoctlFlag`), cmd, arg, in_size, out_size; in_size bytes follow."""
IOCTL_OUT: Final = struct.Struct("<iIII")
"""result, flags, in_iovs, out_iovs."""
FALLOCATE_IN: Final = struct.Struct("<QQQII")
"""fh, offset, length, mode, padding."""
FSYNC_IN: Final = struct.Struct("<QII")
LSEEK_IN: Final = struct.Struct("<QQII")
"""fh, offset, whence, padding."""
LSEEK_OUT: Final = struct.Struct("<Q")
POLL_IN: Final = struct.Struct("<QQII")
"""fh, the number by which the waiter is woken, flags, events."""
POLL_OUT: Final = struct.Struct("<II")
"""events, padding."""
POLL_SCHEDULE_NOTIFY: Final = 1
NOTIFY_POLL: Final = struct.Struct("<Q")
"""The number of the waiter."""
COPY_FILE_RANGE_IN: Final = struct.Struct("<QQQQQQQ")
"""fh, offset, the target's node, fh and offset, length, flags."""
INTERRUPT_IN: Final = struct.Struct("<Q")
WRITE_OUT: Final = struct.Struct("<II")
"""size, padding"""
FORGET_IN: Final = struct.Struct("<Q")
BATCH_FORGET_IN: Final = struct.Struct("<II")
FORGET_ONE: Final = struct.Struct("<QQ")
"""node, how many references: one entry of BATCH_FORGET."""
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
    PARALLEL_DIRECT_WRITES = 1 << 6
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


# -- requests -----------------------------------------------------------------------------------
#
# Nobody changes them, but they are not frozen: making a frozen one takes four times as long, half a
# microsecond more in every request.


@attrs.define
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


@attrs.define
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


@attrs.define
class ReadRequest:
    """FUSE_READ of at most ``size`` bytes. ``file_flags`` are the open file's, as of this read.

    ``cached``: the kernel keeps what it gets. Also of a file that it does not cache for read(2): it
    is how splice(2), sendfile(2) and their like read a file.
    """

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
    cached: bool = False

    @property
    def nonblocking(self) -> bool:
        return bool(self.file_flags & os.O_NONBLOCK)


@attrs.define
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


@attrs.define
class GetxattrRequest:
    """FUSE_GETXATTR: the value of the attribute ``name``, or with ``size`` 0 only its length.

    ``pid`` is the calling thread's id (0 if it is not visible from here).
    """

    opcode: ClassVar = Opcode.GETXATTR

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    name: bytes
    size: int


@attrs.define
class FsyncRequest:
    """FUSE_FSYNC. ``data_only``: fdatasync(2)."""

    opcode: ClassVar = Opcode.FSYNC

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    data_only: bool


@attrs.define
class PollRequest:
    """FUSE_POLL. ``waiter`` is to be woken when the file is ready; None if nobody will wait."""

    opcode: ClassVar = Opcode.POLL

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    waiter: int | None


@attrs.define
class SeekRequest:
    """FUSE_LSEEK. ``whence`` is SEEK_DATA or SEEK_HOLE: the kernel sees to the others."""

    opcode: ClassVar = Opcode.LSEEK

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    offset: int
    whence: int


@attrs.define
class CopyRequest:
    """FUSE_COPY_FILE_RANGE of ``length`` bytes between two open files of the mount."""

    opcode: ClassVar = Opcode.COPY_FILE_RANGE

    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    fh: int
    offset: int
    target_nodeid: int
    target_fh: int
    target_offset: int
    length: int
    flags: int


@attrs.define
class NameRequest:
    """FUSE_LOOKUP or FUSE_UNLINK of ``name`` in the directory ``nodeid``."""

    opcode: Opcode
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    name: bytes


@attrs.define
class GetattrRequest:
    """FUSE_GETATTR."""

    opcode: ClassVar = Opcode.GETATTR

    unique: int
    nodeid: int


@attrs.define
class ForgetRequest:
    """FUSE_FORGET or FUSE_BATCH_FORGET: (node, how many references) of each that is let go of."""

    opcode: Opcode
    unique: int
    nodeid: int
    lookups: list[tuple[int, int]]


@attrs.define
class OpenRequest:
    """FUSE_OPEN of a node, or FUSE_CREATE of ``name`` in one; ``flags`` are open(2)'s.

    ``mode``: the type and permissions of what is created, the umask applied.
    """

    opcode: Opcode
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    flags: int
    mode: int = 0
    name: bytes = b""

    @property
    def create(self) -> bool:
        return self.opcode is Opcode.CREATE


@attrs.define
class ReleaseRequest:
    """FUSE_RELEASE: the last descriptor of an open file has gone. Mappings may live on."""

    opcode: ClassVar = Opcode.RELEASE

    unique: int
    nodeid: int
    fh: int


@attrs.define
class InterruptRequest:
    """FUSE_INTERRUPT: the caller of request ``target`` has a signal waiting."""

    opcode: ClassVar = Opcode.INTERRUPT

    unique: int
    target: int


@attrs.define
class InitRequest:
    """FUSE_INIT: the kernel's version, and what it offers (`InitFlag` bits, both words in one)."""

    opcode: ClassVar = Opcode.INIT

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int


@attrs.define
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
    | FsyncRequest
    | ReadRequest
    | WriteRequest
    | GetxattrRequest
    | SeekRequest
    | PollRequest
    | CopyRequest
    | NameRequest
    | GetattrRequest
    | ForgetRequest
    | OpenRequest
    | ReleaseRequest
    | InterruptRequest
    | InitRequest
    | OtherRequest
)
Frame: TypeAlias = bytes | bytearray | memoryview

SMALL_REPLY: Final = 256
"""More than the body of any reply whose size the request does not choose."""

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


def build_notification(code: NotifyCode, body: bytes) -> bytes:
    """A frame that answers nothing."""
    return OUT_HEADER.pack(OUT_SIZE + len(body), code, 0) + body


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
