"""Many clients' protections set side by side, natively where that is to be had.

For: a change of a region, which takes an mprotect(2) or two in each of its clients. The usual client
is borrowed by the compiled module (``_native.c``), in threads that it starts; each that is unusual
in any way, and all of them where there is no such module, by ``borrow.py`` in the tracing thread.

Promises: those of ``borrow.py``, whichever way it goes; outcomes in order, one for each client; one
that fails or hangs keeps no other from being done.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from msharefs.clients import native
from msharefs.clients.arch import Number
from msharefs.clients.borrow import borrow, vdso_instruction
from msharefs.clients.gone import Gone
from msharefs.clients.procmap import has_query
from msharefs.clients.ptrace import Tracee
from msharefs.region.errors import ClientStuck

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.replica import Protect
    from msharefs.clients.space import AddressSpace
    from msharefs.clients.tracer import Session, Tracer

T = TypeVar("T")


class Guard(Protocol):
    """Wraps what a borrowed thread does, for a gate that has to be told whom we have in hand."""

    @property
    def told(self) -> int:
        """The BPF map, by thread id, by which the compiled module tells the gate itself."""

    def __call__(self, body: Body[T]) -> Body[T]: ...


THREADS: Final = 4
"""Up to so many processors get a thread each. Where there are more, so many threads trace while
the others' clients run."""

# The structures of _native.c: tid, status, instruction, first, count, disturbed, maps, cpu, known;
# and number and three arguments of a call.
_JOB: Final = struct.Struct("=iiQIIIiiI")
_CALL: Final = struct.Struct("=QQQQ")
_MASK: Final = (1 << 64) - 1


async def protect_many(
    tracer: Tracer,
    pids: Sequence[int],
    steps: Sequence[Sequence[Protect]],
    limit: float,
    *,
    spaces: Sequence[AddressSpace] | None = None,
    known: Sequence[bool] | None = None,
    guard: Guard | None = None,
) -> list[Exception | None]:
    """Have process ``pids[i]`` make ``steps[i]``, in order, up to the first that fails.

    ``limit``: seconds for all. ``spaces[i]``: the address space that is meant; another program's is
    left alone, as Gone. ``known[i]``: as for ``borrow``. What can be the matter with one:
    NotAdoptable, ClientStuck, Gone (see ``borrow``), OSError of a step. Not to be cancelled.
    """
    outcomes: list[Exception | None] = [None] * len(pids)
    left: Iterable[int] = range(len(pids))
    if pids and native.present and (spaces is None or has_query()):
        with trio.CancelScope(shield=True):
            told = -1 if guard is None else guard.told
            left = await _natively(pids, steps, limit, spaces, known, told, outcomes)
    sessions: list[Session[None]] = []
    left = list(left)
    for index in left:
        body = protecting(steps[index])
        sessions.append(
            borrow(
                pids[index],
                body if guard is None else guard(body),
                limit=limit,
                known=known is not None and known[index],
                check=None if spaces is None else spaces[index].check,
            )
        )
    for index, outcome in zip(left, await tracer.run(sessions), strict=True):
        outcomes[index] = outcome
    return outcomes


def protecting(steps: Sequence[Protect]) -> Body[None]:
    """What a borrowed thread does for it."""

    def body(thread: Borrowed) -> Session[None]:
        for step in steps:
            result = yield from thread.call(
                Number.MPROTECT, step.address, step.size, int(step.prot)
            )
            if result < 0:
                raise _failed(thread.pid, -result, f" {step.prot.text()}")

    return body


async def _natively(
    pids: Sequence[int],
    steps: Sequence[Sequence[Protect]],
    limit: float,
    spaces: Sequence[AddressSpace] | None,
    known: Sequence[bool] | None,
    told: int,
    outcomes: list[Exception | None],
) -> list[int]:
    """Note the outcomes. Whose are to be had by ``borrow``."""
    held: list[AddressSpace] = []
    jobs: list[bytes] = []
    calls: list[bytes] = []
    taken: list[int] = []
    slow: list[int] = []
    placed: dict[int, tuple[int, int]] = {}  # the calls of equal processes are put down once
    try:
        for index, pid in enumerate(pids):
            if pid <= 0:
                slow.append(index)
                continue
            maps = cpu = -1
            if spaces is not None:
                try:
                    maps = spaces[index].enter()
                except Gone as error:
                    outcomes[index] = error
                    continue
                held.append(spaces[index])
                cpu = spaces[index].cpu
            place = placed.get(id(steps[index]))
            if place is None:
                place = placed[id(steps[index])] = len(calls), len(steps[index])
                calls += [
                    _CALL.pack(Number.MPROTECT, step.address, step.size, int(step.prot))
                    for step in steps[index]
                ]
            asked = known is not None and known[index]
            jobs.append(_JOB.pack(pid, 0, vdso_instruction(pid), *place, 0, maps, cpu, asked))
            taken.append(index)
        packed = bytearray().join(jobs)
        await trio.to_thread.run_sync(
            native.borrow_many,
            packed,
            bytearray().join(calls),
            THREADS,
            int(limit * 1e9),
            Tracee.own_device & _MASK,
            told,
        )
    finally:
        for space in held:
            space.leave()
    for index, (_, status, *_, cpu, _) in zip(taken, _JOB.iter_unpack(packed), strict=True):
        if spaces is not None:
            spaces[index].cpu = cpu
        if status == native.SLOW:
            slow.append(index)
        elif status:
            outcomes[index] = _outcome(pids[index], status)
    return slow


def _outcome(pid: int, status: int) -> Exception:
    if status == native.GONE:
        return Gone(f"process {pid}")
    if status == native.STUCK:
        return ClientStuck(f"process {pid} did not stop, or finish a call, in time")
    return _failed(pid, status)


def _failed(pid: int, code: int, prot: str = "") -> OSError:
    return OSError(code, f"process {pid}: mprotect{prot}: {os.strerror(code)}")
