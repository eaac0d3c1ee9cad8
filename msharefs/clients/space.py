"""The truth about one address space: what it has mapped of our files, and whether it still is.

For: looking at a client again and again, cheaply, and never taking somebody else for it.

Promises: an :class:`AddressSpace` is the one that the process had when it was opened. Its
/proc/PID/maps stays open and belongs to that memory, not to the number: after exec() every look
raises Gone although the process lives on, and a number that is given to another process is never
mistaken. Costs two descriptors. May be looked at by several threads at once, and closed meanwhile.

Leaves out: which region is meant, and what should be mapped. Source: proc_pid_maps(5),
proc_pid_smaps(5), pidfd_open(2), kcmp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import select
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msharefs.clients.gone import Gone
from msharefs.clients.procmap import (
    READ_FLAGS,
    all_mappings,
    check_alive,
    read_text,
    shared_mappings,
)
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from msharefs.abi import Prot
    from msharefs.clients.procmap import MappedRange

SYS_KCMP: Final = 312
"""x86-64, as all that is done to clients."""
KCMP_VM: Final = 1

_SMAPS_HEAD: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ", re.MULTILINE)
_SMAPS_FLAGS: Final = re.compile(rb"^VmFlags:(.*)$", re.MULTILINE)
_MAY: Final = ((b" mr ", 1), (b" mw ", 2), (b" me ", 4))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class AddressSpace:
    """One address space, known by a process that has it."""

    def __init__(self, pid: int) -> None:
        """Raises Gone if there is no such process, PermissionError if it may not be looked at."""
        self.pid = pid
        self.tid = pid
        """A thread that had it: another than ``pid`` if the first thread has ended."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise Gone(f"process {pid}") from None
        try:
            self._maps, self.tid = _open_maps(pid)
        except BaseException:
            os.close(self._pidfd)
            raise
        self._lock = threading.Lock()
        self._users = 1
        self._closed = False
        if self.process_ended():  # then the maps may be another's, who was given the number
            self.close()
            raise Gone(f"process {pid}")

    def __repr__(self) -> str:
        return f"AddressSpace(pid={self.pid})"

    def fileno(self) -> int:
        """The pidfd: readable once the whole process has ended."""
        return self._pidfd

    # -- looking

    def windows(
        self,
        device: int,
        inode: int,
        *,
        within: tuple[int, int] | None = None,
        private: bool = False,
    ) -> list[MappedRange]:
        """The mappings of the file ``(st_dev, st_ino)``, lowest offset first. Raises Gone.

        ``within`` is a part of the address space, ``(start, end)``. ``private``: MAP_PRIVATE ones
        as well, at the cost of reading the text.
        """
        found = [m for m in self._look(device, within, private=private) if m.inode == inode]
        found.sort(key=_offset)
        return found

    def files(self, device: int, *, private: bool = False) -> dict[int, list[MappedRange]]:
        """The mappings of all files on ``device`` by inode, lowest address first. Raises Gone."""
        return by_inode(self._look(device, None, private=private))

    def _look(
        self, device: int, within: tuple[int, int] | None, *, private: bool
    ) -> list[MappedRange]:
        with self._open() as maps:
            if not private:
                return shared_mappings(maps, self.pid, device, *(within or (0, 1 << 64)))
            found = all_mappings(maps, self.pid, device)
        if within is not None:
            found = [m for m in found if m.end > within[0] and m.start < within[1]]
        return found

    def may(self, window: MappedRange) -> Prot:
        """What mprotect() could at most give ``window``: VM_MAYREAD and so on.

        Reads /proc/PID/smaps, for which the kernel walks the page tables: milliseconds for a
        process with much memory. Raises Gone, also if the mapping is no longer there.
        """
        self.check()
        path = f"/proc/{self.pid}/task/{self.tid}/smaps"
        try:
            descriptor = os.open(path, READ_FLAGS)
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"process {self.pid}") from None
        try:
            text = read_text(descriptor)
        finally:
            os.close(descriptor)
        self.check()  # an exec meanwhile shows another's
        for head in _SMAPS_HEAD.finditer(text):
            if int(head[1], 16) <= window.start < int(head[2], 16):
                flags = _SMAPS_FLAGS.search(text, head.end())
                return PROTS[sum(bit for name, bit in _MAY if flags and name in flags[1] + b" ")]
        raise Gone(f"the mapping at {window.start:#x} of process {self.pid}")

    # -- identity

    def check(self) -> None:
        """Raises Gone if the address space has ended: by exec() or the end of the process."""
        with self._open() as maps:
            check_alive(maps, self.pid)

    def process_ended(self) -> bool:
        """Whether the process has ended, all its threads."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def order(self, other: AddressSpace) -> int:
        """0: the same address space (vfork(), CLONE_VM). Else -1 or 1, in some order of them all.

        Raises Gone if one of the two threads has ended, OSError where kcmp(2) is not to be had.
        """
        result = int(
            _libc.syscall(
                ctypes.c_long(SYS_KCMP),
                ctypes.c_int(self.tid),
                ctypes.c_int(other.tid),
                ctypes.c_int(KCMP_VM),
                ctypes.c_ulong(0),
                ctypes.c_ulong(0),
            )
        )
        if result < 0:
            code = ctypes.get_errno()
            if code == errno.ESRCH:
                raise Gone(f"process {self.pid} or {other.pid}")
            raise OSError(code, f"kcmp: {os.strerror(code)}")
        return (0, -1, 1, 1)[result]

    def same_as(self, other: AddressSpace) -> bool:
        """Whether the two processes share their memory. Raises as :meth:`order` does."""
        return self.order(other) == 0

    # -- the descriptors

    def close(self) -> None:
        """Give the descriptors back; whoever is just looking finishes first."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        os.close(self._pidfd)
        self._let_go()

    @contextmanager
    def _open(self) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise Gone(f"process {self.pid}")
            self._users += 1
        try:
            yield self._maps
        finally:
            self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            os.close(self._maps)


def by_inode(found: list[MappedRange]) -> dict[int, list[MappedRange]]:
    """Sort mappings by the file they show; the order of each file's stays."""
    files: dict[int, list[MappedRange]] = {}
    for mapped in found:
        files.setdefault(mapped.inode, []).append(mapped)
    return files


def _open_maps(pid: int) -> tuple[int, int]:
    """/proc/PID/maps, or that of another thread if the first has ended, and whose it is."""
    for tid in _threads(pid):
        try:
            maps = os.open(f"/proc/{pid}/task/{tid}/maps", READ_FLAGS)
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            check_alive(maps, pid)
        except Gone:
            os.close(maps)
            continue
        return maps, tid
    raise Gone(f"process {pid}")


def _threads(pid: int) -> Iterator[int]:
    yield pid
    try:
        yield from (int(t.name) for t in Path(f"/proc/{pid}/task").iterdir() if t.name != str(pid))
    except (FileNotFoundError, ProcessLookupError):
        return


def _offset(window: MappedRange) -> tuple[int, int]:
    return window.offset, window.start
