"""All clients of a mount: every address space that maps one of its regions.

For: whom a change of a region has to reach, and what is known of each; by region and by process.

Promises: one address space is one client, however many threads, processes (vfork(), CLONE_VM) and
regions it has. A client that ends is noticed without being looked at (one epoll of pidfds) and
everything that was held for it is closed; one that exec()s shows it when it is looked at next.

Leaves out: finding clients (census.py, the gates), changing them. Not for use by several threads.
"""

from __future__ import annotations

import select
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from msharefs.clients.gone import Gone
from msharefs.clients.space import AddressSpace
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from msharefs.abi import Prot
    from msharefs.clients.procmap import MappedRange


class State(StrEnum):
    """How a client is made to obey the table of a region."""

    REPLICA = "replica"
    FAULT = "fault"
    UNENFORCED = "unenforced"


class Closable(Protocol):
    """What a client may hold beside its address space: its userfaultfd."""

    def close(self) -> None: ...


@attrs.define(eq=False)
class Attachment:
    """One region in one client.

    ``declared`` are the protections given to mmap(), by address ranges, as the gate recorded them.
    ``armed`` are the ranges of the region that are watched there. ``why`` goes with UNENFORCED.
    """

    inode: int
    state: State = State.UNENFORCED
    why: str = "not looked at yet"
    declared: list[tuple[int, int, Prot]] = attrs.field(factory=list)
    armed: list[tuple[int, int]] = attrs.field(factory=list)
    faults: int = 0

    def declare(self, start: int, end: int, prot: Prot) -> None:
        """The client was given ``[start, end)`` with ``prot``; what was said of it before is void."""
        kept: list[tuple[int, int, Prot]] = []
        for low, high, old in self.declared:
            if low < start:
                kept.append((low, min(high, start), old))
            if high > end:
                kept.append((max(low, end), high, old))
        self.declared = sorted([*kept, (start, end, prot)])

    def rights(
        self, windows: Iterable[MappedRange], otherwise: Callable[[MappedRange], Prot]
    ) -> Prot:
        """What all ``windows`` may do by what was declared; ``otherwise`` where nothing was.

        Forgets what was declared of addresses where no window is any more.
        """
        rights = 7
        live: list[tuple[int, int, Prot]] = []
        for window in windows:
            at = window.start
            for low, high, prot in self.declared:
                if low < window.end and high > window.start:
                    piece = (max(low, window.start), min(high, window.end), prot)
                    live.append(piece)
                    rights &= int(prot)
                    if piece[0] == at:
                        at = piece[1]
            if at < window.end:
                rights &= int(otherwise(window))
        self.declared = sorted(live)
        return PROTS[rights]


@attrs.define(eq=False)
class Client:
    """One address space that maps regions."""

    space: AddressSpace
    comm: str
    regions: dict[int, Attachment] = attrs.field(factory=dict)
    sharers: set[int] = attrs.field(factory=set)
    """Other processes that have this same address space."""
    userfault: Closable | None = None

    @property
    def pid(self) -> int:
        return self.space.pid

    @property
    def faults(self) -> int:
        """Faults served, in all regions."""
        return sum(attached.faults for attached in self.regions.values())

    def close(self) -> None:
        if self.userfault is not None:
            self.userfault.close()
            self.userfault = None
        self.space.close()


class Roster:
    """The clients of one mount. Regions are known by their inode."""

    def __init__(self) -> None:
        self._by_pid: dict[int, Client] = {}
        self._by_region: dict[int, dict[Client, None]] = {}
        self._ended = select.epoll()
        self._by_pidfd: dict[int, Client] = {}
        self.added = 0
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._by_pidfd)

    def __iter__(self) -> Iterator[Client]:
        """All clients, as they are now."""
        return iter(list(self._by_pidfd.values()))

    def of_pid(self, pid: int) -> Client | None:
        """The client that this process is (or shares its address space with)."""
        return self._by_pid.get(pid)

    def of_region(self, inode: int) -> list[Client]:
        """The clients that map the region, longest known first."""
        return list(self._by_region.get(inode, ()))

    # -- coming and going

    def add(self, pid: int, inodes: Iterable[int]) -> Client:
        """The client that process ``pid`` is, new or known, which maps these regions (too).

        Raises Gone, or PermissionError if the process may not be looked at.
        """
        client = self._by_pid.get(pid)
        if client is not None:
            try:
                client.space.check()
            except Gone:  # it has become another program under the same number
                self.forget(client)
                client = None
        if client is None:
            client = self._admit(AddressSpace(pid))
        for inode in inodes:
            if inode not in client.regions:
                client.regions[inode] = Attachment(inode)
            self._by_region.setdefault(inode, {})[client] = None
        return client

    def detach(self, client: Client, inode: int) -> None:
        """The client maps this region no more; forgotten if it was its last."""
        client.regions.pop(inode, None)
        clients = self._by_region.get(inode)
        if clients is not None:
            clients.pop(client, None)
            if not clients:
                del self._by_region[inode]
        if not client.regions:
            self.forget(client)

    def forget(self, client: Client) -> None:
        """Let go of a client and close what was held for it. Nothing if that was done already."""
        if self._by_pidfd.pop(client.space.fileno(), None) is None:
            return
        self.forgotten += 1
        self._ended.unregister(client.space.fileno())
        for pid in (client.pid, *client.sharers):
            if self._by_pid.get(pid) is client:
                del self._by_pid[pid]
        for inode in list(client.regions):
            clients = self._by_region[inode]
            clients.pop(client, None)
            if not clients:
                del self._by_region[inode]
        client.close()

    def close(self) -> None:
        """Forget everyone."""
        for client in self:
            self.forget(client)
        self._ended.close()

    def _admit(self, space: AddressSpace) -> Client:
        try:
            same = self._with_memory_of(space)
            if same is not None:
                same.sharers.add(space.pid)
                self._by_pid[space.pid] = same
                space.close()
                return same
            client = Client(space, _comm(space.pid))
            self._ended.register(space.fileno(), select.EPOLLIN)
        except BaseException:
            space.close()
            raise
        self._by_pidfd[space.fileno()] = self._by_pid[space.pid] = client
        self.added += 1
        return client

    def _with_memory_of(self, space: AddressSpace) -> Client | None:
        for client in self._by_pidfd.values():
            try:
                if space.same_as(client.space):
                    return client
            except (Gone, OSError):
                continue
        return None

    # -- ends

    def reap(self) -> list[Client]:
        """The clients that have ended since the last time, not yet forgotten. Does not wait."""
        return [
            client
            for fd, _ in self._ended.poll(0)
            if (client := self._by_pidfd.get(fd)) is not None
        ]

    async def watch(self, on_end: Callable[[Client], None]) -> None:
        """For ever: as a client ends, tell ``on_end`` and forget it."""
        while True:
            await trio.lowlevel.wait_readable(self._ended.fileno())
            for client in self.reap():
                try:
                    on_end(client)
                finally:
                    self.forget(client)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""
