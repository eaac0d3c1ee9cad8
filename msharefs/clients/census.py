"""Which processes map our files.

For: finding the clients that no gate saw (a descriptor inherited or passed, a process forked), the
rule that a region may not gain a right that a live mapping lacks (mappings outlive descriptors,
and FUSE is told of neither mmap() nor munmap()), and listing a region's clients.

Promises: reads only; a process that ends meanwhile, or that may not be looked at, is passed over.
One pass serves all files of the mount: it costs the same for one region and for a thousand.
The answer is a snapshot: who maps a file a moment later is not in it. ``fresh`` finds every
process that was forked from one that maps something and could be seen by then.

Leaves out: processes that have got a descriptor by other ways than fork() since a ``full`` census,
which only another full one finds; kernel threads; ourselves. Private mappings are looked for only
when asked, since that costs four times as much (see procmap.py).

Source: proc(5), proc_loadavg(5), proc_stat(5).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.clients.gone import Gone
from msharefs.clients.procmap import (
    READ_FLAGS,
    MappedRange,
    all_mappings,
    look_at_many,
    many_at_once,
    shared_mappings,
    unpacked,
)
from msharefs.clients.shown import NOTHING, translate
from msharefs.clients.space import by_inode

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from msharefs.clients.shown import Placed

__all__ = ["Census", "Found", "MappedRange", "mapped_ranges", "process_ids"]

_PROC: Final = Path("/proc")

SETTLED: Final = 3.0
"""Seconds after which a number given out belongs to a process that is to be seen, if to any.

A number is given out a little before the process can be seen under it."""

LAP: Final = 1 << 22
"""No number is larger: proc_sys_kernel(5), pid_max."""

FEW: Final = 1024
"""Processes, the list of which costs no more than a switch to a thread."""

FORKS_A_SECOND: Final = 1_000_000
"""More than any machine makes: what bounds how soon the numbers can have come round."""


@attrs.frozen
class Found:
    """A process that maps files of the mount, and its mappings by inode."""

    pid: int
    files: dict[int, list[MappedRange]]


class Census:
    """Looks for those who map files of one mount. Blocking; may be called from any thread.

    What ``fresh`` has looked at it does not look at again, so each process is told to one caller.
    """

    def __init__(self, device: int, placed: Placed = NOTHING) -> None:
        """``device`` is the mount's ``st_dev``; ``placed``: what stands for parts of others."""
        self.device: Final = device
        self.placed: Final = placed
        self._us = os.getpid()
        self._proc = os.open(_PROC, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._loadavg = os.open(_PROC / "loadavg", READ_FLAGS)
        self._can_seek = self._list_from(self._us)[:1] == [self._us]
        self._lock = threading.Lock()
        # Numbers come round; here they go on, a lap being LAP. Up to _floor all are done with,
        # _seen are those looked at since, _mark is the next floor, once it has settled.
        self._lap = 0
        self._floor = self._mark = self._last = 0
        self._seen: set[int] = set()
        self._looked = self._marked = -1.0
        self._limit = self._forks = 0

    def close(self) -> None:
        """Not while it is being asked."""
        os.close(self._proc)
        os.close(self._loadavg)

    def full(self, *, private: bool = False, known: Container[int] = ()) -> list[Found]:
        """Everyone who maps something. ``private``: also those with MAP_PRIVATE mappings alone.

        ``known`` are processes that are not looked at.
        """
        with self._lock:
            return self._full(private=private, known=known)

    def fresh(self, *, private: bool = False) -> list[Found]:
        """Those among the processes that are new since the last look of either kind."""
        with self._lock:
            now = time.monotonic()
            if self._looked < 0 or self._came_round(now):
                return self._full(private=private, anew=True)
            new = self._new_processes()
            self._settle(now)
            return self._look_at(new, private=private)

    def nobody_new(self) -> bool:
        """Whether ``fresh`` would find nobody to look at. Does not block; False if it had to."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            now = time.monotonic()
            soon = (now - self._looked) * FORKS_A_SECOND < self._limit
            if self._looked < 0 or not soon or len(self._seen) > FEW:
                return False
            new = self._new_processes()
            if new:
                self._seen.difference_update([self._number(pid, self._last) for pid in new])
                return False
            self._settle(now)
            return True
        finally:
            self._lock.release()

    def some(self, pids: Iterable[int]) -> list[Found]:
        """Those of these processes who map something shared."""
        return self._look_at(pids, private=False)

    def at(self, pid: int, *, private: bool = False) -> Found | None:
        """What one process maps; None if nothing."""
        mapped = self._look(pid, f"{pid}/maps", private)
        return Found(pid, by_inode(mapped)) if mapped else None

    def last_pid(self) -> int:
        """The number given to a process or thread last, in our pid namespace.

        As long as it stays the same nobody was made; if it does not, look.
        """
        return int(os.pread(self._loadavg, 128, 0).rsplit(None, 1)[1])

    # -- looking

    def _full(
        self, *, private: bool, known: Container[int] = (), anew: bool = False
    ) -> list[Found]:
        now = time.monotonic()
        if anew or self._looked < 0 or self._came_round(now):
            self._limit = int((_PROC / "sys/kernel/pid_max").read_text())
            self._forks = _forks()
            ids = list(process_ids())
            self._looked, self._marked, self._mark = now, now, self._given_out()
            self._floor = self._mark - LAP  # whoever is not to be seen yet is new when he is
            self._seen = set()
        else:
            ids = list(process_ids())
            self._given_out()
            self._settle(now)
        floor, lap, last = self._floor, self._lap, self._last
        numbers = [lap + pid if lap + pid <= last else lap + pid - LAP for pid in ids]
        self._seen.update([number for number in numbers if number > floor])
        return self._look_at((pid for pid in ids if pid not in known), private=private)

    def _look_at(self, ids: Iterable[int], *, private: bool) -> list[Found]:
        us, at = self._us, self.at
        if private or not many_at_once():
            looks = (at(pid, private=private) for pid in ids if pid != us)
            return [found for found in looks if found is not None]
        pids = [pid for pid in ids if pid != us]
        found: list[Found] = []
        if not pids:
            return found
        answers = look_at_many(pids, self.device, proc=self._proc)
        devices = self.placed.devices
        others = [look_at_many(pids, device, proc=self._proc) for device in devices]
        for pid, answer, *more in zip(pids, answers, *others, strict=True):
            mapped: list[MappedRange] | None = None
            if isinstance(answer, bytes):
                if answer or any(more):
                    elsewhere = zip(devices, map(partial(_unpacked, pid), more), strict=True)
                    mapped = translate(unpacked(pid, answer), self.placed, elsewhere)
            elif answer == errno.ESRCH:
                mapped = self._look_at_threads(pid, private)
            if mapped:
                found.append(Found(pid, by_inode(mapped)))
        return found

    def _look(self, pid: int, path: str, private: bool) -> list[MappedRange] | None:
        try:
            maps = os.open(path, READ_FLAGS, dir_fd=self._proc)
        except OSError:
            return None  # gone meanwhile, or a process that nobody may look at
        try:
            look = all_mappings if private else shared_mappings
            found = look(maps, pid, self.device)
            others = [(other, shared_mappings(maps, pid, other)) for other in self.placed.devices]
            return translate(found, self.placed, others)
        except Gone:
            # A kernel thread, or a process whose first thread has ended before the others.
            return None if path.count("/") > 1 else self._look_at_threads(pid, private)
        except OSError:
            return None
        finally:
            os.close(maps)

    def _look_at_threads(self, pid: int, private: bool) -> list[MappedRange] | None:
        try:
            if os.stat(f"{pid}/task", dir_fd=self._proc).st_nlink <= 3:
                return None
            threads = [entry.name for entry in (_PROC / str(pid) / "task").iterdir()]
        except OSError:
            return None
        looks = (self._look(pid, f"{pid}/task/{tid}/maps", private) for tid in threads)
        return next((found for found in looks if found is not None), None)

    # -- which are new

    def _given_out(self) -> int:
        """The number given out last, going on where the numbers come round."""
        pid = self.last_pid()
        if pid < self._last % LAP:
            self._lap += LAP
        self._last = self._lap + pid
        return self._last

    def _number(self, pid: int, last: int) -> int:
        """That of the process, if it was given out in the lap that ends with ``last``."""
        number = self._lap + pid
        return number if number <= last else number - LAP

    def _came_round(self, now: float) -> bool:
        """Whether all numbers may have been given out since the last look."""
        if (now - self._looked) * FORKS_A_SECOND < self._limit:
            return False
        forks = _forks()
        before, self._forks = self._forks, forks
        return forks - before >= self._limit // 2

    def _settle(self, now: float) -> None:
        """All new processes have been taken down."""
        self._looked = now
        if now - self._marked >= SETTLED:
            self._floor, self._mark, self._marked = self._mark, self._last, now
            self._seen = {number for number in self._seen if number > self._floor}

    def _new_processes(self) -> list[int]:
        floor, seen = self._floor, self._seen
        while True:
            lap = self._lap
            listed = self._processes_from(floor - lap + 1 if floor >= lap else 1)
            # Asked after they were listed: none of them is newer than this.
            last = self._given_out()
            if lap == self._lap:
                break
        new: list[int] = []
        for pid in listed:
            number = lap + pid if lap + pid <= last else lap + pid - LAP
            if number > floor and number not in seen:
                seen.add(number)
                new.append(pid)
        return new

    def _processes_from(self, first: int) -> list[int]:
        """The processes from the number ``first`` on."""
        if self._can_seek:
            return self._list_from(first)
        return [pid for pid in process_ids() if pid >= first]

    def _list_from(self, first: int) -> list[int]:
        """The same by seeking, which passes over threads and older processes in the kernel.

        Where in the directory a process stands is the kernel's own affair, so it is tried out
        before it is relied upon: Linux adds 258 to the number (fs/proc/base.c).
        """
        os.lseek(self._proc, first + 258, os.SEEK_SET)
        names = os.listdir(self._proc)  # noqa: PTH208 - of a descriptor
        return [int(name) for name in names if name.isdecimal()]


def process_ids() -> Iterator[int]:
    """Every process there is now."""
    return map(int, filter(str.isdecimal, os.listdir(_PROC)))  # noqa: PTH208 - half the cost


def mapped_ranges(
    device: int, inode: int, pids: Iterable[int] | None = None, placed: Placed = NOTHING
) -> list[MappedRange]:
    """All mappings of the file ``(st_dev, st_ino)``, in ``pids`` or in every process.

    Private ones as well. Costs one read of /proc/PID/maps per process: tens of microseconds for
    small ones. Blocking; call it from a thread.
    """
    found: list[MappedRange] = []
    for pid in process_ids() if pids is None else pids:
        try:
            maps = os.open(f"/proc/{pid}/maps", READ_FLAGS)
        except OSError:
            continue  # gone meanwhile, or a process that nobody may look at
        try:
            others = [(other, shared_mappings(maps, pid, other)) for other in placed.devices]
            mapped = translate(all_mappings(maps, pid, device), placed, others)
            found += [m for m in mapped if m.inode == inode]
        except (Gone, OSError):
            continue
        finally:
            os.close(maps)
    return found


def _unpacked(pid: int, answer: bytes | int) -> list[MappedRange]:
    return unpacked(pid, answer) if isinstance(answer, bytes) else []


def _forks() -> int:
    """Processes and threads made since the machine was started."""
    for line in (_PROC / "stat").read_bytes().splitlines():
        if line.startswith(b"processes "):
            return int(line.split()[1])
    return 0
