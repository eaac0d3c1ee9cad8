"""What a process has mapped, as /proc says it.

For: finding the mappings of our files in one process, by PROCMAP_QUERY where the kernel has it
(Linux 6.11) and by the text of /proc/PID/maps where not. The query leaves out on the kernel's
side what is private or anonymous: a process that maps nothing of ours costs one or two of them,
a third of what its text costs. Private mappings of files are every library's; to find one of
ours among them the text is no slower than queries, so it is always read for those.

Promises: reads only, and takes the process's memory map for as long as it takes to copy one entry
(which waits while the process itself is in mmap() or the like: call from a thread). A mapping that
the process moves or makes while it is being looked at may be missed, as in any reading of /proc.

Source: proc_pid_maps(5), linux/fs.h (struct procmap_query). A mapping of a passthrough file is
listed with the device and inode of the FUSE file, both ways.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import struct
from array import array
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.clients import native
from msharefs.clients.gone import Gone
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from msharefs.abi import Prot
    from msharefs.clients.shown import Shown

PROCMAP_QUERY: Final = 0xC0686611
"""_IOWR('f', 17, struct procmap_query), 104 bytes."""

_SHARED: Final = 0x08
_COVERING_OR_NEXT: Final = 0x10
_FILE_BACKED: Final = 0x20

# size, query_flags, query_addr; what follows is the answer and two buffers we do not want.
_QUESTION: Final = struct.pack("<QQQ80x", 104, _SHARED | _COVERING_OR_NEXT | _FILE_BACKED, 0)
_ADDRESS: Final = struct.Struct("<Q")
_ADDRESS_AT: Final = 16
# vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode, dev_major, dev_minor
_ANSWER: Final = struct.Struct("<QQQQQQII")
_ANSWER_AT: Final = 24

# What the compiled module says of one mapping: start, end, protection, offset, inode.
_MAPPED: Final = struct.Struct("=QQQQQ")

_LINE: Final = rb"^([0-9a-f]+)-([0-9a-f]+) (...)([sp]) ([0-9a-f]+) %02x:%02x ([0-9]+)"

READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC
_CHUNK: Final = 1 << 16


@attrs.define(unsafe_hash=True)
class MappedRange:
    """``[start, end)`` of a process's address space shows the file from ``offset``. Bytes.

    A value, though not frozen: making one would take four times as long.
    """

    pid: int
    start: int
    end: int
    prot: Prot
    shared: bool
    offset: int
    inode: int = 0
    shown: Shown | None = None
    """If it is a placement's (shown.py): offset and inode are those in the region then."""


@functools.cache
def has_query() -> bool:
    """Whether this kernel answers PROCMAP_QUERY; found by asking about ourselves, once."""
    descriptor = os.open("/proc/self/maps", READ_FLAGS)
    try:
        fcntl.ioctl(descriptor, PROCMAP_QUERY, bytearray(_QUESTION))
    except OSError as error:
        return error.errno == errno.ENOENT  # understood; we map nothing of that kind
    else:
        return True
    finally:
        os.close(descriptor)


def shared_mappings(
    maps: int, pid: int, device: int, start: int = 0, end: int = 1 << 64
) -> list[MappedRange]:
    """All shared mappings of files on ``device``, lowest address first.

    ``maps`` is an open /proc/PID/maps. With ``start`` and ``end`` only those that have a byte in
    that part of the address space. Raises Gone if the address space has ended.
    """
    if not has_query():
        found = all_mappings(maps, pid, device)
        return [m for m in found if m.shared and m.end > start and m.start < end]
    major, minor = os.major(device), os.minor(device)
    buffer = bytearray(_QUESTION)
    found = []
    # Local names: this loop is most of a census.
    ioctl, place, unpack = fcntl.ioctl, _ADDRESS.pack_into, _ANSWER.unpack_from
    at = start
    try:
        while at < end:
            place(buffer, _ADDRESS_AT, at)
            ioctl(maps, PROCMAP_QUERY, buffer)
            low, at, flags, _, offset, inode, major_of, minor_of = unpack(buffer, _ANSWER_AT)
            if minor_of == minor and major_of == major and low < end:
                found.append(MappedRange(pid, low, at, PROTS[flags & 7], True, offset, inode))
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise Gone(f"the address space of process {pid}") from None
        if error.errno != errno.ENOENT:
            raise
    return found


def all_mappings(maps: int, pid: int, device: int) -> list[MappedRange]:
    """As :func:`shared_mappings`, private ones as well: by the text."""
    text = read_text(maps)
    if not text:
        raise Gone(f"the address space of process {pid}")
    if b" %02x:%02x " % (os.major(device), os.minor(device)) not in text:
        return []
    return [
        MappedRange(
            pid,
            int(start, 16),
            int(end, 16),
            prot_of(prot),
            sharing == b"s",
            int(offset, 16),
            int(inode),
        )
        for start, end, prot, sharing, offset, inode in _lines_of(device).findall(text)
    ]


def listed_at(maps: int, address: int) -> tuple[int, int]:
    """The device (as ``st_dev``) and inode of the file that is mapped there. Raises LookupError."""
    for line in read_text(maps).splitlines():
        fields = line.split(None, 5)
        low, _, high = fields[0].partition(b"-")
        if int(low, 16) <= address < int(high, 16):
            major, _, minor = fields[3].partition(b":")
            return os.makedev(int(major, 16), int(minor, 16)), int(fields[4])
    raise LookupError(f"nothing is mapped at {address:#x}")


def many_at_once() -> bool:
    """Whether there is :func:`look_at_many`."""
    return native.present and has_query()


def look_at_many(whom: Iterable[int], device: int, *, proc: int = -1) -> list[bytes | int]:
    """:func:`shared_mappings` of many: for each what :func:`unpacked` reads, or an errno.

    ``whom``: open files /proc/PID/maps; or, with the directory ``proc`` open, process ids. ESRCH:
    the address space has ended; of a process id, its first thread has before the others.
    """
    packed = array("i", whom).tobytes()
    return native.look_at_many(packed, proc, os.major(device), os.minor(device))


def unpacked(pid: int, answer: bytes) -> list[MappedRange]:
    """What :func:`look_at_many` has found of process ``pid``."""
    return [
        MappedRange(pid, start, end, PROTS[prot], True, offset, inode)
        for start, end, prot, offset, inode in _MAPPED.iter_unpack(answer)
    ]


def check_alive(maps: int, pid: int) -> None:
    """Raises Gone if the address space that ``maps`` was opened for has ended."""
    if has_query():
        shared_mappings(maps, pid, 0, (1 << 64) - 1)
    elif not os.pread(maps, 1, 0):
        raise Gone(f"the address space of process {pid}")


def read_text(descriptor: int) -> bytes:
    """The whole of a file of /proc. Raises Gone if its process has ended."""
    parts: list[bytes] = []
    size = 0
    try:
        while part := os.pread(descriptor, _CHUNK, size):
            parts.append(part)
            size += len(part)
    except ProcessLookupError:
        raise Gone("the process") from None
    return b"".join(parts)


def prot_of(text: bytes) -> Prot:
    """``r-x`` as a number."""
    return PROTS[(text[0] == 0x72) | (text[1] == 0x77) << 1 | (text[2] == 0x78) << 2]


@functools.lru_cache(maxsize=8)
def _lines_of(device: int) -> re.Pattern[bytes]:
    return re.compile(_LINE % (os.major(device), os.minor(device)), re.MULTILINE)
