"""One thread that traces: it runs sessions, many at a time, each about threads of other processes.

A *session* is a generator. It seizes a thread (:meth:`Tracee.seize`), yields the tracee to wait
for its next :class:`Stop`, does what it has to, resumes the tracee and yields it again; its return
value is the outcome. While one waits, the others go on, so hundreds of processes are worked on at
the same time and a slow one holds up nobody. What can be thrown at a ``yield``:

- :class:`TimedOut`: ``tracee.deadline`` has passed. The session may set a new one and go on.
- :class:`Gone`: the thread has ended.

A session that yields a tracee which it has not resumed waits for an :meth:`Tracer.answer` from
another thread instead.

Promises: a session's exception is its own affair, it fails with it and the rest goes on; when a
session ends, however it ends, its tracee is let go, at once if it is stopped, else as soon as it
stops (what is still to be put right then is ``tracee.rest``, a session of its own). A child that a
tracee forks, or a thread that it starts, is not traced. A session must not start processes: their
ends would be reaped here. When the thread ends, the kernel lets go
of whatever is left.

ptrace(2) binds a tracee to one thread of its tracer. The thread sleeps in sigtimedwait(2) for
SIGCHLD, by which the kernel reports stops, or for a signal of its own that says there is work.
SIGCHLD must therefore be blocked in every thread: call :func:`prepare_process` before any other
thread starts. Should one be lost all the same, the thread looks again by itself, only later.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

import trio

from msharefs.clients.gone import Gone
from msharefs.clients.ptrace import Stop, Tracee, poll, rescue, stop_of, stray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

T = TypeVar("T")
Session: TypeAlias = Generator[Tracee, Any, T]
"""Sent in: a Stop, or what answer() gave."""

WAKE: Final = signal.SIGURG  # ignored by default, so that one that comes late does no harm
_SIGNALS: Final = frozenset({signal.SIGCHLD, WAKE})
_FOREVER: Final = float("inf")

_LOOK_AGAIN: Final = 0.05
"""Seconds between looks at tracees for which no signal came. Only a lost SIGCHLD needs it."""
_LOOK_FOR_STRAYS: Final = 1.0
_STARTS: Final = 4
"""Sessions begun before the stops of those begun already are looked at."""
_STOPS: Final = 64
_STUCK: Final = 0.05
"""Seconds after which a step that does not end is one that waits for an execve(2)."""
_SPIN: Final = 30e-6
"""Seconds of looking for the next stop before sleeping: one call of a tracee takes about that."""
_LOST: Final = 0
"""The wait status of a thread that has ended, whichever way."""
_GRACE: Final = 0.2
_HARD_END: Final = 2.0
"""Seconds that sessions have, once the tracer is closed: to end by themselves; at all."""


class TimedOut(Exception):
    """Thrown into a session at its tracee's deadline."""


class Closed(Exception):
    """The tracer has been closed: the outcome of what it did not get to."""


def prepare_process() -> None:
    """Block SIGCHLD in this thread and in all that it starts. Programs started inherit that."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, none would be sent
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})


def pause(seconds: float) -> Session[None]:
    """Within a session: let others go on for a while."""
    try:
        yield Tracee(0, monotonic() + seconds)
    except TimedOut:
        return


class _Job:
    __slots__ = ("done", "session", "tracee")

    def __init__(
        self, session: Session[Any], done: Callable[[Any], None], tracee: Tracee | None = None
    ) -> None:
        self.session = session
        self.done = done
        self.tracee = tracee


class Tracer:
    """The thread. Its methods may be called from any thread."""

    def __init__(self, name: str = "tracer") -> None:
        self._jobs: deque[_Job] = deque()
        self._answers: deque[tuple[int, Any]] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._woken = False
        self._active: set[_Job] = set()
        self._waiting: dict[int, _Job] = {}  # by thread id
        self._strays: set[int] = set()
        self._next = _FOREVER  # no deadline is earlier
        self._end = _FOREVER
        self._moved = 0.0
        self._status = ctypes.c_int()
        self._steps = 0
        self._awake = threading.Event()
        self._ended: deque[int] = deque()  # tracees that the second thread has heard of
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._second = threading.Thread(target=self._stand_by, name=f"{name}, second", daemon=True)
        self._thread.start()
        self._second.start()

    def submit(self, session: Session[T], done: Callable[[T | Exception], None]) -> None:
        """Run a session; ``done`` is called with its result or its exception, in the thread.

        Raises Closed if the tracer is.
        """
        self._hand_over([_Job(session, done)])

    def answer(self, tid: int, value: Any) -> None:
        """Give ``value`` to the session that waits, with thread ``tid`` stopped, to be told something.

        Such a session has yielded a tracee without resuming it. Nothing if there is none (any more).
        """
        with self._lock:
            if self._closing:
                return
            self._answers.append((tid, value))
            self._wake()

    async def run(self, sessions: Iterable[Session[T]]) -> list[T | Exception]:
        """Run sessions side by side; their results, or exceptions, in order.

        Not to be cancelled: it returns when all sessions have ended, which their deadlines bound.
        """
        token = trio.lowlevel.current_trio_token()
        all_done = trio.Event()
        batch = list(sessions)
        results: list[Any] = [None] * len(batch)
        left = len(batch)

        def collect(index: int) -> Callable[[Any], None]:
            def done(outcome: Any) -> None:
                nonlocal left
                results[index] = outcome
                left -= 1
                if not left:
                    token.run_sync_soon(all_done.set)

            return done

        if batch:
            self._hand_over([_Job(session, collect(i)) for i, session in enumerate(batch)])
            with trio.CancelScope(shield=True):
                await all_done.wait()
        return results

    def close(self) -> None:
        """Bring all sessions to their end, let go of all tracees, end the thread. Blocks briefly."""
        with self._lock:
            if not self._closing:
                self._closing = True
                if self._thread.is_alive():
                    signal.pthread_kill(_ident(self._thread), WAKE)
        self._thread.join()
        self._second.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- any thread to the tracing thread ---------------------------------------------------------

    def _hand_over(self, jobs: list[_Job]) -> None:
        with self._lock:
            if self._closing:
                raise Closed("the tracer is closed")
            self._jobs.extend(jobs)
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            signal.pthread_kill(_ident(self._thread), WAKE)

    # --- the tracing thread -----------------------------------------------------------------------

    def _main(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with contextlib.suppress(OSError):
            # A tracee that goes on must not take the processor from us: the next one waits.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        try:
            self._loop()
        except BaseException:
            log.exception("the tracer ends")
            raise
        finally:
            with self._lock:
                self._closing = True
            self._awake.set()
            for job in [*self._active, *self._jobs]:
                self._report(job, Closed("the tracer was closed"))

    def _loop(self) -> None:
        while True:
            busy = self._start_some()
            busy = self._deliver() or busy
            while self._ended:
                self._report_of(self._ended.popleft(), _LOST)
            busy = self._sweep() or busy
            now = monotonic()
            if now >= self._next:
                self._expire(now)
            if busy:
                self._moved = now
                continue
            if self._closing and self._wind_up(now):
                return
            if self._jobs or self._answers:
                continue
            if self._waiting and now < self._moved + _SPIN:
                os.sched_yield()
                continue
            self._sleep(now)

    def _stand_by(self) -> None:
        """The second thread: while the first is awake, see whether it gets on; see ptrace.py."""
        while True:
            self._awake.wait()
            if not self._thread.is_alive():
                return
            steps = self._steps
            time.sleep(_STUCK)
            if steps == self._steps and self._awake.is_set():
                self._ended.extend(rescue([*self._waiting, *self._strays]))

    def _sleep(self, now: float) -> None:
        self._awake.clear()
        try:
            self._sleep_until(now)
        finally:
            self._awake.set()

    def _sleep_until(self, now: float) -> None:
        look = _LOOK_AGAIN if self._waiting else _LOOK_FOR_STRAYS if self._strays else 3600.0
        # With nothing traced here, SIGCHLD tells of the tracees of other threads (_native.c).
        signals = _SIGNALS if self._waiting or self._strays else {WAKE}
        if signal.sigtimedwait(signals, max(min(self._next - now, look), 0.0)) is None:
            self._look_for_lost()

    def _look_for_lost(self) -> None:
        """A first thread vanishes without a report when another thread becomes a new program."""
        for tid in list(self._waiting):
            found = poll(self._status, tid)
            if found:
                self._report_of(tid, self._status.value if found > 0 else _LOST)

    def _start_some(self) -> bool:
        self._woken = False  # before looking: who comes later wakes us again
        jobs = self._jobs
        for _ in range(_STARTS):
            if not jobs:
                return False
            job = jobs.popleft()
            self._active.add(job)
            self._step(job, job.session.send, None)
        return True

    def _deliver(self) -> bool:
        delivered = False
        while self._answers:
            tid, value = self._answers.popleft()
            job = self._waiting.get(tid)
            if job is not None and job.tracee is not None and job.tracee.stopped:
                delivered = True
                self._step(job, job.session.send, value)
        return delivered

    def _sweep(self) -> bool:
        status = self._status
        for count in range(_STOPS):
            tid = poll(status)
            if tid <= 0:
                return count > 0
            self._report_of(tid, status.value)
        return True

    def _report_of(self, tid: int, status: int) -> None:
        """A thread has stopped or ended: let its session go on."""
        stop = stop_of(status)
        job = self._waiting.get(tid)
        if stop is None:
            self._strays.discard(tid)
            if job is not None:
                del self._waiting[tid]
                assert job.tracee is not None
                job.tracee.seized = False
                self._step(job, job.session.throw, Gone(f"thread {tid}"))
        elif job is None:
            self._let_go(tid, stop)
        else:
            assert job.tracee is not None
            job.tracee.stopped = True
            self._step(job, job.session.send, stop)

    def _step(self, job: _Job, resume: Callable[[Any], Tracee], argument: Any) -> None:
        """Let a session go on until it waits again or ends."""
        self._steps += 1
        try:
            tracee = resume(argument)
        except StopIteration as end:
            self._finish(job, end.value)
            return
        except Exception as error:  # noqa: BLE001 - it is the session's outcome
            self._finish(job, error)
            return
        if tracee is not job.tracee:
            self._drop(job)
            job.tracee = tracee
            if tracee.tid:
                self._waiting[tracee.tid] = job
        self._next = min(self._next, tracee.deadline)

    def _finish(self, job: _Job, outcome: Any) -> None:
        self._drop(job)
        self._active.discard(job)
        self._report(job, outcome)

    def _report(self, job: _Job, outcome: Any) -> None:
        try:
            job.done(outcome)
        except Exception:
            log.exception("what a session's outcome was handed to failed")

    def _drop(self, job: _Job) -> None:
        """The job no longer waits for its tracee: let go of it, now or when it stops."""
        tracee = job.tracee
        if tracee is None or not tracee.seized:
            if tracee is not None and self._waiting.get(tracee.tid) is job:
                del self._waiting[tracee.tid]
            return
        if self._waiting.get(tracee.tid) is job:
            del self._waiting[tracee.tid]
        try:
            if tracee.stopped:
                tracee.detach()
            elif tracee.rest is not None:
                rest = _Job(tracee.rest(), _log_failure)
                tracee.rest = None
                self._active.add(rest)
                self._step(rest, rest.session.send, None)
            else:
                self._strays.add(tracee.tid)
                tracee.interrupt()
        except Gone:
            pass
        except OSError as error:
            log.error("%s", error)

    def _let_go(self, tid: int, stop: Stop) -> None:
        """Nobody waits for this thread: a stray, or one that changed its id by an exec."""
        tracee = stray(tid)
        self._strays.discard(tid)
        try:
            job = None
            if stop.exec:
                job = self._waiting.pop(tracee.event_message(), None)
            if stop.interrupt:
                tracee.settle(tracee.registers())
            tracee.detach(stop.signal)
            if job is not None:
                assert job.tracee is not None
                job.tracee.seized = False
                self._step(job, job.session.throw, Gone(f"thread {tid}: exec"))
        except Gone:
            pass

    def _expire(self, now: float) -> None:
        self._next = _FOREVER
        for job in list(self._active):
            tracee = job.tracee
            if tracee is None:
                continue
            if tracee.deadline <= now:
                self._step(job, job.session.throw, TimedOut(f"thread {tracee.tid}"))
            else:
                self._next = min(self._next, tracee.deadline)

    def _wind_up(self, now: float) -> bool:
        """Hurry what is still going on after close(); whether the thread may end."""
        if self._end == _FOREVER:
            self._end = now + _HARD_END
        for job in self._active:
            assert job.tracee is not None
            job.tracee.deadline = min(job.tracee.deadline, now + _GRACE)
            self._next = min(self._next, job.tracee.deadline, self._end)
        return not (self._active or self._jobs) or now >= self._end


def _ident(thread: threading.Thread) -> int:
    assert thread.ident is not None
    return thread.ident


def _log_failure(outcome: Any) -> None:
    if isinstance(outcome, Exception) and not isinstance(outcome, Gone | TimedOut):
        log.error("a thread was let go late", exc_info=outcome)
