"""All clients of a mount: every address space that maps one of its regions.

For: whom a change of a region has to reach, and what is known of each; by region and by process.

Promises: one address space is one client, however many threads, processes (vfork(), CLONE_VM) and
regions it has. A client that ends is noticed without being looked at (one epoll of pidfds) and
everything that was held for it is closed; one that exec()s shows it when it is looked at next.

Leaves out: finding clients (census.py, the gates), changing them. Not for use by several threads.
"""

from __future__ import annotations

import select
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from msharefs.clients.gone import Gone
from msharefs.clients.space import AddressSpace, files_of
from msharefs.region.mapping import PROTS
from msharefs.region.spans import SpanSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from msharefs.abi import Prot
    from msharefs.clients.census import Census, Found
    from msharefs.clients.faults import Served
    from msharefs.clients.procmap import MappedRange


_Files = dict[int, list["MappedRange"]]


class State(StrEnum):
    """How a client is made to obey the table of a region."""

    REPLICA = "replica"
    FAULT = "fault"
    UNENFORCED = "unenforced"


@attrs.define(eq=False)
class Attachment:
    """One region in one client.

    ``declared`` are the protections given to mmap(), by address ranges, as the gate recorded them.
    ``armed`` are the ranges of the region that are watched there. ``advised`` are the addresses for
    which huge pages were asked for (``service/advising.py``). ``why`` goes with UNENFORCED.
    """

    inode: int
    state: State = State.UNENFORCED
    why: str = "not looked at yet"
    declared: list[tuple[int, int, Prot]] = attrs.field(factory=list)
    armed: list[tuple[int, int]] = attrs.field(factory=list)
    advised: SpanSet = attrs.field(factory=SpanSet)
    faults: int = 0
    arriving: bool = False
    """It is about to map the region: a survey that does not see that yet changes nothing."""

    def declare(self, start: int, end: int, prot: Prot) -> None:
        """The client was given ``[start, end)`` with ``prot``; what was said of it before is void."""
        kept: list[tuple[int, int, Prot]] = []
        for low, high, old in self.declared:
            if low < start:
                kept.append((low, min(high, start), old))
            if high > end:
                kept.append((max(low, end), high, old))
        self.declared = sorted([*kept, (start, end, prot)])

    def parts(
        self, windows: Iterable[MappedRange], otherwise: Callable[[MappedRange], Prot]
    ) -> dict[Prot, list[MappedRange]]:
        """``windows`` by what each may do at most, cut where that changes.

        Where nothing was declared ``otherwise`` says, and that counts as declared from then on.
        """
        found: dict[Prot, list[MappedRange]] = {}
        new: list[tuple[int, int, Prot]] = []
        for window in windows:
            at = window.start
            for low, high, prot in [*self.declared, (window.end, window.end, PROTS[0])]:
                start, end = max(low, at), min(high, window.end)
                if at < min(low, window.end):
                    rights = otherwise(window)
                    new.append((at, min(low, window.end), rights))
                    found.setdefault(rights, []).append(_cut(window, *new[-1][:2]))
                if start < end:
                    found.setdefault(prot, []).append(_cut(window, start, end))
                at = max(at, end)
        for low, high, prot in new:
            self.declare(low, high, prot)
        return found

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


def _cut(window: MappedRange, start: int, end: int) -> MappedRange:
    """The part of ``window`` at these addresses."""
    if (start, end) == (window.start, window.end):
        return window
    offset = window.offset + start - window.start
    return attrs.evolve(window, start=start, end=end, offset=offset)


@attrs.define(eq=False)
class Client:
    """One address space that maps regions."""

    space: AddressSpace
    comm: str
    regions: dict[int, Attachment] = attrs.field(factory=dict)
    sharers: list[int] = attrs.field(factory=list)
    """Other processes that were seen to have this same address space."""
    files: dict[int, list[MappedRange]] = attrs.field(factory=dict)
    """What it had mapped of the mount, by inode, when it was looked at last. (``MappedRange.pid`` is
    anybody's: those who have mapped the same may share this.)"""
    met: int = 0
    """Goes up each time that it is added, and when it has been changed by itself: what was seen of
    it before is not to be relied upon any more."""
    looked: int = 0
    """What ``met`` was when ``files`` were looked at: has anything happened since?"""
    served: Served | None = None
    """Its userfaultfds, once it has made some."""
    borrowed: bool = False
    """A thread of it was borrowed before: it had no seccomp filter then."""
    on_close: list[Callable[[], None]] = attrs.field(factory=list)
    """What else is held for it and let go with it."""
    closed: bool = False
    """It was forgotten: nothing is to be held for it any more."""
    lock: trio.Semaphore = attrs.field(factory=lambda: trio.Semaphore(1, max_value=1))
    """Held by whoever changes this client, so that what is seen of it stays true meanwhile.
    (A semaphore, since one task may take it and another, which sees the work through, let it go.)"""

    @property
    def pid(self) -> int:
        return self.space.pid

    @property
    def faults(self) -> int:
        """Faults served, in all regions."""
        return sum(attached.faults for attached in self.regions.values())

    def close(self) -> None:
        self.closed = True
        while self.on_close:
            self.on_close.pop()()
        self.space.close()


class Roster:
    """The clients of one mount. Regions are known by their inode."""

    def __init__(self, census: Census, *, is_region: Callable[[int], bool] | None = None) -> None:
        """``census``: of the mount. ``is_region``: whether a file of it counts (default: all do)."""
        self._device = census.device
        self._is_region = is_region
        self._census = census
        self._surveying = trio.Lock()
        self._by_pid: dict[int, Client] = {}
        self._by_region: dict[int, dict[Client, None]] = {}
        # Sorted as kcmp(2) sorts address spaces, so that finding one costs few comparisons.
        self._ordered: list[Client] = []
        self._ends = select.epoll()
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

    # -- coming

    async def survey(self, *, full: bool = False, private: bool = False) -> list[Client]:
        """Take a census and put everyone it finds on the roster; who was not on it before.

        Once it returns, whoever mapped a region when it was called is on the roster, even if
        another task's survey found them. ``full`` looks at everyone, not at new processes alone:
        each client is also attached to what it maps by now, detached from what it has unmapped,
        and forgotten if it has become another program; what it maps is left in ``Client.files``.
        ``private`` as for :class:`~msharefs.clients.census.Census`.
        """
        async with self._surveying:
            if not full and self._census.nobody_new():
                return []
            before = [(client, client.met) for client in self] if full else []
            found, looks = await trio.to_thread.run_sync(self._look, full, private, before)
            for client, met, files in looks:
                self._update(client, met, files)
            return self._meet(found)

    async def look_around(self, clients: Sequence[Client]) -> None:
        """Look at these clients, as a full survey does, and at everybody who is not known.

        Once it returns, whoever mapped a region when it was called is on the roster. Side by side:
        half of it is done by another processor.
        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._strangers)
            try:
                await self._refresh(clients)
            except Exception as error:  # noqa: BLE001 - raised below, as it is
                failure = error
        if failure is not None:
            raise failure

    async def look_at(self, clients: Sequence[Client], pids: Iterable[int]) -> None:
        """Look at these clients, as a full survey does, and at the processes that are not known."""
        await self._refresh(clients)
        strangers = [pid for pid in pids if pid not in self._by_pid]
        if strangers:
            self._meet(await trio.to_thread.run_sync(self._census.some, strangers))

    async def _refresh(self, clients: Sequence[Client]) -> None:
        if not clients:
            return
        before = [(client, client.met) for client in clients]
        looks = await trio.to_thread.run_sync(self._look_again, before, False)
        for client, met, files in looks:
            self._update(client, met, files)

    async def _strangers(self) -> None:
        async with self._surveying:
            known = {client.space.pid for client in self._by_pidfd.values()}
            self._meet(await trio.to_thread.run_sync(lambda: self._census.full(known=known)))

    def _meet(self, found: Iterable[Found]) -> list[Client]:
        new: list[Client] = []
        for one in found:
            regions = self._regions(one.files)
            if regions:
                known = self.added
                try:
                    client = self.add(one.pid, regions)
                except (Gone, PermissionError):
                    continue
                client.files, client.looked = one.files, client.met
                if self.added != known:
                    new.append(client)
        return new

    def _look(
        self, full: bool, private: bool, before: list[tuple[Client, int]]
    ) -> tuple[list[Found], list[tuple[Client, int, _Files | None]]]:
        """In a thread: the census, and what the clients map; None for those that have gone."""
        if not full:
            return self._census.fresh(private=private), []
        known = {client.pid for client, _ in before}
        found = self._census.full(private=private, known=known)
        looks = self._look_again(before, private)
        for client, _, files in looks:
            if files is None and (other := self._census.at(client.pid, private=private)):
                found.append(other)  # another program
        return found, looks

    def _look_again(
        self, before: list[tuple[Client, int]], private: bool
    ) -> list[tuple[Client, int, _Files | None]]:
        found: list[_Files | None] = [{}] * len(before)
        if not private:
            found = files_of([client.space for client, _ in before], self._device)
        looks: list[tuple[Client, int, _Files | None]] = []
        for (client, met), shared in zip(before, found, strict=True):
            files = shared
            if shared is not None and (private or not client.regions.keys() <= shared.keys()):
                with suppress(Gone):
                    files = None
                    files = client.space.files(self._device, private=True)
            looks.append((client, met, files))
        return looks

    def _update(self, client: Client, met: int, files: _Files | None) -> None:
        """Take down what was seen of a client, unless a gate has met it since."""
        if client.met != met or self._by_pidfd.get(client.space.fileno()) is not client:
            return
        if files is None:
            if not self._pass_on(client):
                self.forget(client)
            return
        if files is client.files and client.looked == met and len(files) == len(client.regions):
            return  # by now it is attached to what it maps
        client.files, client.looked = files, met
        self._attach(client, self._regions(files))
        gone = [i for i, at in client.regions.items() if i not in files and not at.arriving]
        for inode in gone:
            self.detach(client, inode)

    def _regions(self, inodes: Iterable[int]) -> list[int]:
        return [i for i in inodes if self._is_region is None or self._is_region(i)]

    def add(self, pid: int, inodes: Iterable[int]) -> Client:
        """The client that process ``pid`` is, new or known, which maps these regions (too).

        Raises Gone, or PermissionError if the process may not be looked at.
        """
        client = self._by_pid.get(pid)
        if client is not None and not self._still_has(pid, client):
            client = None
        if client is None:
            client = self._admit(AddressSpace(pid, self._census.placed))
        client.met += 1
        self._attach(client, inodes)
        return client

    def _attach(self, client: Client, inodes: Iterable[int]) -> None:
        for inode in inodes:
            if inode not in client.regions:
                client.regions[inode] = Attachment(inode)
                self._by_region.setdefault(inode, {})[client] = None

    def _still_has(self, pid: int, client: Client) -> bool:
        """Whether process ``pid`` still has the address space that it is known by."""
        if pid == client.pid:
            try:
                client.space.check()
            except Gone:  # it runs another program now
                self.forget(client)
                return False
            return True
        # One of several processes that had it: only asking anew tells.
        client.sharers.remove(pid)
        del self._by_pid[pid]
        return False

    def _admit(self, space: AddressSpace) -> Client:
        try:
            place, same = self._find(space)
            if same is not None:
                if space.pid != same.pid:
                    same.sharers.append(space.pid)
                    self._by_pid[space.pid] = same
                space.close()
                return same
            client = Client(space, _comm(space.pid))
            self._take_in(client, place)
        except BaseException:
            space.close()
            raise
        self.added += 1
        return client

    def _find(self, space: AddressSpace) -> tuple[int, Client | None]:
        """Who has this address space already; else the place in the order that is its own."""
        low, high = 0, len(self._ordered)
        while low < high:
            middle = (low + high) // 2
            client = self._ordered[middle]
            try:
                client.space.check()
                order = space.order(client.space)
            except Gone:
                space.check()
                # It is the other who has ended. Whoever watches for that is still to be told.
                del self._ordered[middle]
                high -= 1
                continue
            except OSError:  # no kcmp(2): then each process counts as one of its own
                return low, None
            if order == 0:
                return middle, client
            if order < 0:
                high = middle
            else:
                low = middle + 1
        return low, None

    # -- going

    def detach(self, client: Client, inode: int) -> None:
        """The client maps this region no more; forgotten if it was its last."""
        client.regions.pop(inode, None)
        self._strike(client, inode)
        if not client.regions:
            self.forget(client)

    def forget(self, client: Client) -> None:
        """Let go of a client and close what was held for it. Nothing if that was done already."""
        if self._by_pidfd.get(client.space.fileno()) is not client:
            return
        self.forgotten += 1
        self._drop_space(client)
        for inode in client.regions:
            self._strike(client, inode)
        client.close()

    def close(self) -> None:
        """Forget everyone."""
        for client in self:
            self.forget(client)
        self._ends.close()

    def _strike(self, client: Client, inode: int) -> None:
        clients = self._by_region.get(inode)
        if clients is not None:
            clients.pop(client, None)
            if not clients:
                del self._by_region[inode]

    def _drop_space(self, client: Client) -> None:
        del self._by_pidfd[client.space.fileno()]
        self._ends.unregister(client.space.fileno())
        if client in self._ordered:
            self._ordered.remove(client)
        for pid in (client.pid, *client.sharers):
            if self._by_pid.get(pid) is client:
                del self._by_pid[pid]

    async def watch(self, on_end: Callable[[Client], None]) -> None:
        """For ever: as a client ends, tell ``on_end`` and forget it.

        Not told of one whose process has ended while another process goes on in the same address
        space: the client is that one from then on.
        """
        while True:
            await trio.lowlevel.wait_readable(self._ends.fileno())
            for client in self._ended():
                if self._pass_on(client):
                    continue
                try:
                    on_end(client)
                finally:
                    self.forget(client)

    def _ended(self) -> list[Client]:
        return [client for fd, _ in self._ends.poll(0) if (client := self._by_pidfd.get(fd))]

    def _pass_on(self, client: Client) -> bool:
        """Hand the client of an ended process to another that has the same address space."""
        if not client.sharers:
            return False
        try:
            client.space.check()
        except Gone:
            return False
        if client in self._ordered:  # nothing can be compared with it any more
            self._ordered.remove(client)
        for pid in list(client.sharers):
            try:
                space = AddressSpace(pid, self._census.placed)
            except (Gone, PermissionError):
                continue
            # With the first process gone there is nobody to compare it with, but who has run
            # another program since then maps nothing of ours.
            try:
                files = space.files(self._device, private=True)
                place, same = (
                    self._find(space) if client.regions.keys() <= files.keys() else (0, client)
                )
            except Gone:
                same = client
            if same is not None:
                space.close()
                continue
            self._drop_space(client)
            client.space.close()
            client.space = space
            client.sharers.remove(pid)
            self._take_in(client, place)
            return True
        return False

    def _take_in(self, client: Client, place: int) -> None:
        self._ends.register(client.space.fileno(), select.EPOLLIN)
        self._ordered.insert(place, client)
        self._by_pidfd[client.space.fileno()] = client
        for pid in (client.pid, *client.sharers):
            self._by_pid[pid] = client


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""
