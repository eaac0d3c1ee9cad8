"""The truth about one address space: what it has mapped of our files, and whether it still is.

For: looking at a client again and again, cheaply, and never taking somebody else for it.

Promises: an :class:`AddressSpace` is the one that the process had when it was opened. Its
/proc/PID/maps stays open and belongs to that memory, not to the number: after exec() every look
raises Gone although the process lives on, and a number that is given to another process is never
mistaken. Costs two descriptors. May be looked at by several threads at once, and closed meanwhile.

Leaves out: which region is meant, and what should be mapped. Source: proc_pid_maps(5),
proc_pid_map_files(5), pidfd_open(2), kcmp(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs

from msharefs.abi import Prot
from msharefs.clients.gone import Gone
from msharefs.clients.procmap import (
    READ_FLAGS,
    all_mappings,
    check_alive,
    has_query,
    look_at_many,
    many_at_once,
    shared_mappings,
    unpacked,
)
from msharefs.clients.shown import NOTHING, translate
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msharefs.clients.procmap import MappedRange
    from msharefs.clients.shown import Placed, Shown

    Files: TypeAlias = dict[int, list[MappedRange]]
    """Mappings by the inode of the file they show."""

SYS_KCMP: Final = 312
"""x86-64, as all that is done to clients."""
KCMP_VM: Final = 1

FEW: Final = 16
"""Mappings, up to which it is no use to look at some of them alone."""

REMEMBERED: Final = 2048
"""Answers. A process's two come by turns when a right is taken and given back."""

READ_EXEC: Final = int(Prot.READ | Prot.EXEC)
WRITE: Final = int(Prot.WRITE)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@attrs.frozen
class _Run:
    """Neighbouring mappings ``[start, end)`` that show offset o of one file at o + shift."""

    start: int
    end: int
    shift: int


class AddressSpace:
    """One address space, known by a process that has it."""

    def __init__(self, pid: int, placed: Placed = NOTHING) -> None:
        """``placed``: what stands for parts of other files (shown.py).

        Raises Gone if there is no such process, PermissionError if it may not be looked at.
        """
        self.pid = pid
        self.placed = placed
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
        self.cpu = -1
        """The processor that it was seen on last; -1: unknown."""
        self.laid: dict[tuple[int, int, int], Shown] = {}
        """What was laid in it of files that are listed as others (shown.py, ``Own``)."""
        self._layouts: dict[tuple[int, int], tuple[_Run, ...]] = {}
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
        part: tuple[int, int] | None = None,
        *,
        private: bool = False,
    ) -> list[MappedRange]:
        """The mappings of the file ``(st_dev, st_ino)``, lowest offset first. Raises Gone.

        ``part``: only those that show some of these bytes of the file, ``(start, end)``. Where a
        process has very many mappings, most of the others are not looked at then; they are taken
        to be what they were if both ends of what they made up together are still in place (a
        process that puts one piece of a region into the middle of another is found out by the
        next look at all). ``private``: MAP_PRIVATE ones as well, at the cost of reading the text.
        """
        if part is not None and not private:
            found = self._windows_of_part(device, inode, part)
            if found is not None:
                return found
        found = [m for m in self._look(device, private=private) if m.inode == inode]
        found.sort(key=_offset)
        self._layouts[device, inode] = _runs(found) if len(found) > FEW else ()
        if part is not None:
            found = _showing(found, part)
        return found

    def files(self, device: int, *, private: bool = False) -> Files:
        """The mappings of all files on ``device`` by inode, lowest address first. Raises Gone."""
        return by_inode(self._look(device, private=private))

    def may(self, window: MappedRange) -> Prot:
        """What mprotect() could at most give ``window``, by the mode its descriptor had.

        Executing counts as reading, as in mmap(2); a mount with noexec gives neither. Raises Gone
        also if the mapping is no longer just as ``window`` says.
        """
        path = f"/proc/{self.tid}/map_files/{window.start:x}-{window.end:x}"
        self.check()
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, ProcessLookupError):
            raise Gone(f"the mapping at {window.start:#x} of process {self.pid}") from None
        self.check()  # after an exec meanwhile it was another's
        readable, writable = bool(mode & stat.S_IRUSR), bool(mode & stat.S_IWUSR)
        if window.shown is not None:  # it may have been opened for less, as its object demands
            writable = window.shown.writable
        return PROTS[(readable and READ_EXEC) | (writable and WRITE)]

    def _look(self, device: int, *, private: bool) -> list[MappedRange]:
        maps = self.enter()
        try:
            look = all_mappings if private else shared_mappings
            found = look(maps, self.pid, device)
            others = [(o, shared_mappings(maps, self.pid, o)) for o in self.placed.devices]
        finally:
            self.leave()
        return translate(found, self.placed, others, self.laid)

    def _windows_of_part(
        self, device: int, inode: int, part: tuple[int, int]
    ) -> list[MappedRange] | None:
        """None if that cannot be told without looking at everything."""
        runs = self._layouts.get((device, inode))
        if not runs or self.placed or not has_query():
            return None
        skips = []
        for run in runs:
            low, high = max(run.start, part[0] + run.shift), min(run.end, part[1] + run.shift)
            if low >= high:
                skips.append(run)
            else:
                skips += [_Run(run.start, low, run.shift), _Run(high, run.end, run.shift)]
        maps = self.enter()
        try:
            found = []
            at = 0
            for skip in [s for s in skips if s.start < s.end]:
                found += shared_mappings(maps, self.pid, device, at, skip.start)
                ends = shared_mappings(maps, self.pid, device, skip.start, skip.start + 1)
                ends += shared_mappings(maps, self.pid, device, skip.end - 1, skip.end)
                if len(ends) != 2 or any(
                    m.inode != inode or m.start - m.offset != skip.shift for m in ends
                ):
                    return None
                at = skip.end
            found += shared_mappings(maps, self.pid, device, at)
        finally:
            self.leave()
        unique = {m.start: m for m in found if m.inode == inode}  # one may reach into both sides
        return _showing(sorted(unique.values(), key=_offset), part)

    # -- identity

    def check(self) -> None:
        """Raises Gone if the address space has ended: by exec() or the end of the process."""
        maps = self.enter()
        try:
            check_alive(maps, self.pid)
        finally:
            self.leave()

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
        self.leave()

    def enter(self) -> int:
        """The open /proc/PID/maps, until :meth:`leave`. Raises Gone."""
        with self._lock:
            if self._closed:
                raise Gone(f"process {self.pid}")
            self._users += 1
        return self._maps

    def leave(self) -> None:
        """Once for each :meth:`enter`."""
        with self._lock:
            self._users -= 1
            last = not self._users
        if last:
            os.close(self._maps)


def _runs(windows: list[MappedRange]) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    for window in sorted(windows, key=_start):
        shift = window.start - window.offset
        if runs and runs[-1].end == window.start and runs[-1].shift == shift:
            runs[-1] = _Run(runs[-1].start, window.end, shift)
        else:
            runs.append(_Run(window.start, window.end, shift))
    return tuple(runs)


def _showing(windows: list[MappedRange], part: tuple[int, int]) -> list[MappedRange]:
    start, end = part
    return [w for w in windows if w.offset < end and start < w.offset + w.end - w.start]


def files_of(spaces: Sequence[AddressSpace], device: int) -> list[Files | None]:
    """:meth:`AddressSpace.files` of many at once; None of one that has ended.

    Those who have mapped the same, as forked processes have, get the same object, again and again:
    it is not to be changed, and its mappings do not tell whose they are (``pid`` is 0). All
    ``spaces`` are of those who map files of one mount.
    """
    if not many_at_once():
        return [_files_or_none(space, device) for space in spaces]
    found: list[Files | None] = [None] * len(spaces)
    entered: list[int] = []
    maps: list[int] = []
    try:
        for index, space in enumerate(spaces):
            try:
                maps.append(space.enter())
            except Gone:
                continue
            entered.append(index)
        answers = look_at_many(maps, device)
        devices = spaces[0].placed.devices if spaces else ()
        others = [look_at_many(maps, other) for other in devices]
    finally:
        for index in entered:
            spaces[index].leave()
    for index, answer, *more in zip(entered, answers, *others, strict=True):
        if isinstance(answer, bytes):
            elsewhere = [(d, a) for d, a in zip(devices, more, strict=True) if a]
            found[index] = _read(device, answer, spaces[index], elsewhere)
        elif answer != errno.ESRCH:
            raise OSError(answer, f"process {spaces[index].pid}: {os.strerror(answer)}")
    return found


_known: dict[tuple[object, ...], Files] = {}


def _read(
    device: int, answer: bytes, space: AddressSpace, elsewhere: list[tuple[int, bytes | int]]
) -> Files | None:
    # What a placement stands for never changes, so what was said of it may be remembered.
    key: tuple[object, ...] = (device, answer)
    others: list[tuple[int, list[MappedRange]]] = []
    if elsewhere:
        key = (device, answer, space.placed.changes, *elsewhere)
        for other, more in elsewhere:
            if not isinstance(more, bytes):  # it has ended meanwhile
                return None
            others.append((other, unpacked(0, more)))
    files = _known.get(key)
    if files is None:
        mapped = translate(unpacked(0, answer), space.placed, others, space.laid)
        files = by_inode(mapped)
        if elsewhere and space.placed.doubtful:  # then it is true of this one only
            return files
        if len(_known) >= REMEMBERED:
            _known.clear()
        _known[key] = files
    return files


def _files_or_none(space: AddressSpace, device: int) -> Files | None:
    try:
        return space.files(device)
    except Gone:
        return None


def by_inode(found: list[MappedRange]) -> Files:
    """Sort mappings by the file they show; the order of each file's stays."""
    files: Files = {}
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


def _start(window: MappedRange) -> int:
    return window.start


def _offset(window: MappedRange) -> tuple[int, int]:
    return window.offset, window.start
