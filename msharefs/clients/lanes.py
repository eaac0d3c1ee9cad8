"""Blocking calls in order, client by client, in as many threads as there are slow clients.

For: calls that wait for a client's mmap_lock. A client that holds it (or hangs with it) keeps one
thread busy and nobody else waiting; calls for one client are made in the order they were given.

Leaves out: results, but for whoever awaits one (:func:`result_of`). A job that wants to say
something else says it itself.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_THREADS: Final = 64
"""So many clients may hang at the same moment before others have to wait for them."""


@attrs.define(eq=False)
class Lane:
    """The jobs of one client. ``busy``: a thread works on them, or will."""

    jobs: deque[Callable[[], None]] = attrs.field(factory=deque)
    busy: bool = False


class Workers:
    """Threads, made when all that there are have something to do. They never keep a program alive."""

    def __init__(self, most: int = MOST_THREADS) -> None:
        self._most = most
        self._lanes: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._closed = False
        self._idle = 0
        """Threads that wait, minus lanes that wait for a thread."""

    def submit(self, lane: Lane, job: Callable[[], None]) -> None:
        """Run ``job`` after everything given for that lane before. Never waits."""
        with self._lock:
            lane.jobs.append(job)
            if lane.busy:
                return
            lane.busy = True
        self._start(lane)

    def reserve(self, lane: Lane) -> bool:
        """Take a lane that has nothing to do: jobs for it wait until :meth:`release`."""
        with self._lock:
            if lane.busy:
                return False
            lane.busy = True
            return True

    def release(self, lane: Lane) -> None:
        """A lane that was reserved goes on with what was submitted meanwhile. From any thread."""
        with self._lock:
            if not lane.jobs:
                lane.busy = False
                return
        self._start(lane)

    def _start(self, lane: Lane) -> None:
        with self._lock:
            if self._closed:  # the threads have ended, or will without looking at it
                self._lanes.put(None)
            start = self._closed or (self._idle <= 0 and self._threads < self._most)
            if start:
                self._threads += 1
            else:
                self._idle -= 1
        if start:
            threading.Thread(target=self._work, name="lane", daemon=True, args=(lane,)).start()
        else:
            self._lanes.put(lane)

    def close(self) -> None:
        """Let the idle threads end, and those that hang as soon as they do not any more."""
        with self._lock:
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._lanes.put(None)

    def _work(self, first: Lane) -> None:
        lane: Lane | None = first
        while lane is not None:
            self._drain(lane)
            lane = self._lanes.get()

    def _drain(self, lane: Lane) -> None:
        while True:
            with self._lock:
                if not lane.jobs:
                    lane.busy = False
                    self._idle += 1
                    return
                job = lane.jobs.popleft()
            try:
                job()
            except Exception:
                log.exception("a call for a client failed")


async def result_of(workers: Workers, lane: Lane, job: Callable[[], T]) -> T:
    """What ``job`` returns or raises, run in its turn. Who is cancelled leaves it to be done."""
    token, done = trio.lowlevel.current_trio_token(), trio.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(job())
        except BaseException as error:  # noqa: BLE001 - it is the caller's to raise
            errors.append(error)
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(done.set)

    workers.submit(lane, run)
    await done.wait()
    if errors:
        raise errors[0]
    return results[0]
