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

import attrs
import trio

from msharefs.clients import native
from msharefs.clients.arch import Number
from msharefs.clients.borrow import borrow, vdso_instruction
from msharefs.clients.gone import Gone
from msharefs.clients.procmap import has_query
from msharefs.clients.ptrace import Tracee
from msharefs.region.errors import ClientStuck

if TYPE_CHECKING:
    from collections.abc import Sequence

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

# The structures of _native.c: tid, status, instruction, first, count, disturbed, maps, cpu, known,
# failed, pad, kept; and number, six arguments, inode, flags, text, length, from, which, keep, always.
_JOB: Final = struct.Struct("=iiQIIIiiIIIqq")
_CALL: Final = struct.Struct("=8QIIIBBBB")
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
    left: list[int] = list(range(len(pids)))
    if pids and possible(spaces):
        programs: dict[int, bytes] = {}  # the calls of equal processes are put down once
        for one in steps:
            if id(one) not in programs:
                programs[id(one)] = b"".join(
                    call(Number.MPROTECT, step.address, step.size, int(step.prot)) for step in one
                )
        done = await natively(
            pids,
            [programs[id(one)] for one in steps],
            b"",
            limit,
            spaces=spaces,
            known=known,
            guard=guard,
        )
        left = [index for index, result in enumerate(done) if result.slow]
        for index, result in enumerate(done):
            outcomes[index] = result.trouble
            if result.code:
                outcomes[index] = _failed(pids[index], result.code)
    sessions: list[Session[None]] = []
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


@attrs.frozen
class Result:
    """What became of the calls that a process was to make."""

    slow: bool = False
    """It is left to ``borrow.py``."""
    trouble: Exception | None = None
    """It could not be borrowed, or not in time."""
    code: int = 0
    """The errno of the first call that failed."""
    failed: int = 0
    """Which one that was."""
    kept: tuple[int, int] = (-1, -1)
    """What it still has of the values that calls of its have kept; -1: nothing."""


_DONE: Final = Result()


def possible(spaces: Sequence[AddressSpace] | None) -> bool:
    """Whether there is the compiled module, and what it needs."""
    return native.present and (spaces is None or has_query())


def call(
    number: int,
    *arguments: int,
    door: tuple[int, int] = (0, 0),
    text: tuple[int, int] = (0, 0),
    value: tuple[int, int] = (0, 0),
    keep: int = 0,
    always: bool = False,
) -> bytes:
    """A system call, for :func:`natively`.

    ``door``: the inode that may be opened, with which flags, and mapped during the call. ``text``: where in the
    texts, and how much of it, is written to where the result points. ``value``: which of the two
    values that calls keep is added, to which argument. ``keep``: as which (1, 2) the result is
    kept. ``always``: the call gives back the value that it uses, so it is made after a failure too.
    """
    six = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    masked = [argument & _MASK for argument in six]
    return _CALL.pack(number, *masked, *door, *text, *value, keep, always)


async def natively(
    pids: Sequence[int],
    programs: Sequence[bytes],
    texts: bytes,
    limit: float,
    *,
    spaces: Sequence[AddressSpace] | None,
    known: Sequence[bool] | None,
    guard: Guard | None,
) -> list[Result]:
    """Have process ``pids[i]`` make the calls of ``programs[i]`` by the compiled module.

    Not to be cancelled.
    """
    results = [Result(slow=True)] * len(pids)
    held: list[AddressSpace] = []
    jobs: list[bytes] = []
    calls: list[bytes] = []
    taken: list[int] = []
    count = 0
    placed: dict[int, tuple[int, int]] = {}
    try:
        for index, pid in enumerate(pids):
            if pid <= 0:
                continue
            maps = cpu = -1
            if spaces is not None:
                try:
                    maps = spaces[index].enter()
                except Gone as error:
                    results[index] = Result(trouble=error)
                    continue
                held.append(spaces[index])
                cpu = spaces[index].cpu
            program = programs[index]
            place = placed.get(id(program))
            if place is None:
                place = placed[id(program)] = count, len(program) // _CALL.size
                calls.append(program)
                count += place[1]
            asked = known is not None and known[index]
            where = vdso_instruction(pid), *place, 0, maps, cpu, asked
            jobs.append(_JOB.pack(pid, 0, *where, 0, 0, -1, -1))
            taken.append(index)
        packed = bytearray().join(jobs)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(
                native.borrow_many,
                packed,
                b"".join(calls),
                texts,
                THREADS,
                int(limit * 1e9),
                Tracee.own_device & _MASK,
                -1 if guard is None else guard.told,
            )
    finally:
        for space in held:
            space.leave()
    for index, (_, status, *_, cpu, _, failed, _, one, two) in zip(
        taken, _JOB.iter_unpack(packed), strict=True
    ):
        if spaces is not None:
            spaces[index].cpu = cpu
        results[index] = _result(pids[index], status, failed, (one, two))
    return results


def _result(pid: int, status: int, failed: int, kept: tuple[int, int]) -> Result:
    if not status:
        return _DONE
    if status == native.SLOW:
        return Result(slow=True, kept=kept)
    if status == native.GONE:
        return Result(trouble=Gone(f"process {pid}"))
    if status == native.STUCK:
        text = f"process {pid} did not stop, or finish a call, in time"
        return Result(trouble=ClientStuck(text))
    return Result(code=status, failed=failed)


def _failed(pid: int, code: int, prot: str = "") -> OSError:
    return OSError(code, f"process {pid}: mprotect{prot}: {os.strerror(code)}")
