"""Which processes map a file, and with which protection, as /proc says it.

For: the rule that a region may not gain a right that a live mapping lacks (mappings outlive
descriptors, and FUSE is told of neither mmap() nor munmap()), and for listing a region's clients.

Promises: reads only; a process that ends meanwhile, or that may not be looked at, is passed over.
The answer is a snapshot: who maps the file a moment later is not in it.

Source: proc_pid_maps(5). A mapping of a passthrough file is listed with the device and inode of
the FUSE file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from msharefs.abi import Prot

_PROC: Final = Path("/proc")


@attrs.frozen
class MappedRange:
    """``[start, end)`` of a process's address space shows the file from ``offset``. Bytes."""

    pid: int
    start: int
    end: int
    prot: Prot
    shared: bool
    offset: int


def process_ids() -> Iterator[int]:
    """Every process there is now."""
    with os.scandir(_PROC) as entries:
        yield from [int(entry.name) for entry in entries if entry.name.isdecimal()]


def mapped_ranges(device: int, inode: int, pids: Iterable[int] | None = None) -> list[MappedRange]:
    """All mappings of the file ``(st_dev, st_ino)``, in ``pids`` or in every process.

    Costs one read of /proc/PID/maps per process: tens of microseconds for small ones. Blocking;
    call it from a thread.
    """
    needle = re.compile(
        rb"^([0-9a-f]+)-([0-9a-f]+) (...)([sp]) ([0-9a-f]+) %02x:%02x %d\b"
        % (os.major(device), os.minor(device), inode),
        re.MULTILINE,
    )
    plain = b" %02x:%02x %d " % (os.major(device), os.minor(device), inode)
    found: list[MappedRange] = []
    for pid in process_ids() if pids is None else pids:
        try:
            text = (_PROC / str(pid) / "maps").read_bytes()
        except OSError:
            continue  # gone meanwhile, or a process that nobody may look at
        if plain not in text:
            continue
        for match in needle.finditer(text):
            start, end, prot, sharing, offset = match.groups()
            found.append(
                MappedRange(
                    pid,
                    int(start, 16),
                    int(end, 16),
                    _prot(prot),
                    sharing == b"s",
                    int(offset, 16),
                )
            )
    return found


def _prot(text: bytes) -> Prot:
    return PROTS[(text[0] == 0x72) | (text[1] == 0x77) << 1 | (text[2] == 0x78) << 2]
