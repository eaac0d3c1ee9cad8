"""Files laid over ranges of many processes side by side, by the compiled module.

For: a file that comes into a region, or goes, in each of its clients: six system calls each, among
them an open() that this very server answers. ``lay.py`` does the same for one, and for whoever is
unusual in any way.

Promises: those of ``lay.py``. Who was begun with and could not be finished is named, with what it
has got in hand, so that this can be given back. A thread is let in for its file during the calls
that it is made to make, and never by what it does itself (:func:`expected`).

Leaves out: processes whose thread is in hand already.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from msharefs.clients import native
from msharefs.clients.arch import Number
from msharefs.clients.lay import MAP_SHARED_FIXED, cannot_map, cannot_open
from msharefs.clients.many import call, natively, possible

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from msharefs.clients.lay import Laid
    from msharefs.clients.many import Guard, Result
    from msharefs.clients.space import AddressSpace

_PAGE: Final = 4096
_READ_WRITE: Final = 3
_PRIVATE_ANONYMOUS: Final = 0x22
_PATHS, _FILE = 1, 2
"""The values that calls keep: where the paths are, and the open file."""
_NO_FD: Final = -1


def expected(tid: int) -> tuple[int, int]:
    """The inode that a thread may open and map now, and the flags; 0 if none. From any thread."""
    return native.expected(tid) if native.present else (0, 0)


async def lay_many(
    pids: Sequence[int],
    files: Sequence[Sequence[Laid]],
    limit: float,
    *,
    spaces: Sequence[AddressSpace],
    known: Sequence[bool],
    guard: Guard | None = None,
) -> tuple[list[Exception | None], dict[int, tuple[int, int, int]]]:
    """Have ``files[i]`` laid by process ``pids[i]``; ``limit`` in seconds for all.

    Outcomes as those of :func:`~msharefs.clients.lay.laying`; and whose are still to be had by it,
    with what it is to be told was ``left``. ``spaces``, ``known``, ``guard`` as for
    :func:`~msharefs.clients.many.protect_many`. Not to be cancelled.
    """
    outcomes: list[Exception | None] = [None] * len(pids)
    if not pids or not possible(spaces):
        return outcomes, dict.fromkeys(range(len(pids)), (-1, 0, -1))
    texts = bytearray()
    sizes: list[int] = []
    programs: list[bytes] = []
    errors: list[list[Callable[[int, int], Exception]]] = []
    for one in files:
        paths = b"".join(laid.path + b"\0" for laid in one)
        sizes.append(-len(paths) % _PAGE + len(paths) or _PAGE)
        calls, failures = _program(one, sizes[-1], (len(texts), len(paths)))
        texts += paths
        programs.append(b"".join(calls))
        errors.append(failures)
    results = await natively(
        pids, programs, bytes(texts), limit, spaces=spaces, known=known, guard=guard
    )
    left: dict[int, tuple[int, int, int]] = {}
    for index, result in enumerate(results):
        if result.slow:
            address, fd = result.kept
            left[index] = address, sizes[index], fd
        else:
            outcomes[index] = _outcome(pids[index], result, errors[index])
    return outcomes, left


def _program(
    files: Sequence[Laid], size: int, text: tuple[int, int]
) -> tuple[list[bytes], list[Callable[[int, int], Exception]]]:
    """The calls, and what an errno of each means."""
    memory = (0, size, _READ_WRITE, _PRIVATE_ANONYMOUS, _NO_FD, 0)
    calls = [call(Number.MMAP, *memory, keep=_PATHS, text=text)]
    errors: list[Callable[[int, int], Exception]] = [_no_memory]
    at = 0
    for laid in files:
        door = laid.inode, laid.flags
        flags = laid.flags | os.O_CLOEXEC | os.O_NOFOLLOW
        calls.append(call(Number.OPEN, at, flags, 0, value=(_PATHS, 0), keep=_FILE, door=door))
        errors.append(_opening(laid.path))
        at += len(laid.path) + 1
        for step in laid.steps:
            where = step.address, step.size, int(step.prot), MAP_SHARED_FIXED, 0
            offset = step.offset - laid.delta
            calls.append(call(Number.MMAP, *where, offset, value=(_FILE, 4), door=door))
            errors.append(_mapping(step.prot.text()))
        calls.append(call(Number.CLOSE, 0, value=(_FILE, 0), always=True))
        errors.append(_no_memory)
    calls.append(call(Number.MUNMAP, 0, size, value=(_PATHS, 0), always=True))
    return calls, errors


def _outcome(
    pid: int, result: Result, errors: Sequence[Callable[[int, int], Exception]]
) -> Exception | None:
    return errors[result.failed](pid, result.code) if result.code else result.trouble


def _no_memory(pid: int, code: int) -> Exception:
    if code == errno.EFAULT:
        text = f"memory of process {pid} cannot be written to"
    else:
        text = f"memory in process {pid}: {os.strerror(code)}"
    return OSError(code, text)


def _opening(path: bytes) -> Callable[[int, int], Exception]:
    return lambda pid, code: cannot_open(pid, code, path)


def _mapping(prot: str) -> Callable[[int, int], Exception]:
    return lambda pid, code: cannot_map(pid, code, prot)
