"""The gate: what stands between a program's mmap() of a region and the mapping.

For: what the service needs of a gate whatever its kind (`Gate`), and the question that a gate puts
to it (`Mmap`). The kinds are ``gate_lsm.py`` and ``gate_ptrace.py``.

Leaves out: the verdict, which is the service's (``service/mmaps.py``), and what a gate cannot see,
which the census finds (``census.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from msharefs import abi


class GateUnavailable(Exception):
    """This machine cannot have such a gate; the message is one line that names what is missing."""


@attrs.frozen
class Mmap:
    """What a caller of mmap(2) asks for: the protection of the mapping, and MAP_PRIVATE or not."""

    prot: abi.Prot
    private: bool


class Gate(Protocol):
    """A gate that is in place. The calls return at once but for :meth:`close`.

    ``covers_mprotect``: a client's own mprotect(2) of a region's mapping is refused (EACCES), and
    calls injected into a client must be announced by :meth:`allow`.
    """

    kind: abi.Gate
    covers_mprotect: bool

    def add_mount(self, device: int, memory: int) -> None:
        """Watch the mount ``device``, whose regions' memory lies on ``memory`` (both st_dev)."""

    def remove_mount(self) -> None:
        """Watch nothing. To be called before the mount goes: device numbers are used again."""

    def allow(self, tid: int) -> None:
        """The thread is stopped and ours: let through the mprotect calls that we inject into it."""

    def disallow(self, tid: int) -> None:
        """The reverse of :meth:`allow`, before the thread is let go. Any number of times."""

    def close(self) -> None:
        """Take the gate away. Blocks for some 200 ms: call it from a thread. Idempotent."""
