"""Clients are made to show what the layout shows: the first step of a batch.

For: ``batch.py``. Where a range is to show something else than it does, the client lays the placement
of that over it (``clients/lay.py``). It goes straight to its final protection; with PROT_NONE where
accesses are to be caught, so that none slips through before they are.

Promises: one that fails does not keep the others from being done. Who fails while nobody will put
things back sees nothing there at all (PROT_NONE) rather than memory where a file belongs.

Leaves out: protections of what is shown already, and what a failure means.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, TypeAlias

import attrs
import trio

from msharefs.clients.gone import Gone
from msharefs.clients.lay import laying, mount_path, obstacle
from msharefs.clients.lay_many import lay_many
from msharefs.clients.many import protecting
from msharefs.clients.replica import Comparison, Map, Protect
from msharefs.clients.space import files_of
from msharefs.region.errors import ClientStuck, NotAdoptable
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from msharefs.clients.borrow import Body
    from msharefs.clients.lay import Laid
    from msharefs.clients.procmap import MappedRange
    from msharefs.clients.roster import Client
    from msharefs.region.demand import Demand, Source
    from msharefs.service.batch import Batch
    from msharefs.service.placements import Placement

    Ways: TypeAlias = dict[tuple[Source, bool], list[Map]]
    """What is to be shown, and whether it may come to be stored to: where it goes."""

LIMIT: Final = 1.0
LIMIT_EACH: Final = 0.01
"""Seconds, and seconds more for each client: their open()s are answered one after the other."""


async def lay(batch: Batch) -> dict[Client, Exception]:
    """Have all clients of ``batch`` show what its layout shows. What was the matter with whom.

    Those that failed are left out of the batch from then on.
    """
    placements = batch.enforcer.placements
    if not batch.layout.shows_files and not len(placements):
        return {}
    wanted = [
        attrs.evolve(demand, prot=PROTS[0]) if demand.caught else demand
        for demand in batch.layout.served
    ]
    failures = await _late(batch, wanted)
    todo = _to_lay(batch, wanted)
    if not todo:
        return failures
    device = batch.enforcer.device
    found = await trio.to_thread.run_sync(_plans, todo, batch.windows, device)
    pinned: list[Placement] = []
    files: dict[Client, list[Laid]] = {}
    try:
        for client, plan in found.items():
            if isinstance(plan, Gone):
                batch.forget(client)
            elif isinstance(plan, Exception):
                failures[client] = plan
            else:
                mount, ways = plan
                files[client] = []
                for (source, writable), maps in ways.items():
                    pinned.append(placements.pin(batch.file, source, writable=writable))
                    placements.record(pinned[-1], client.space, maps)
                    files[client].append(placements.laid(pinned[-1], mount, maps))
        outcomes = await _lay(batch, files)
    finally:
        for placement in pinned:
            placements.unpin(placement)
    for client, outcome in outcomes.items():
        if isinstance(outcome, Gone):
            batch.forget(client)
        elif isinstance(outcome, Exception):
            failures[client] = outcome
    await _fail(batch, {client: todo[client] for client in failures if client in todo}, failures)
    await _look_again(batch, [client for client in files if client in batch.windows])
    return failures


async def _lay(batch: Batch, files: dict[Client, list[Laid]]) -> dict[Client, Exception | None]:
    """By the compiled module; by sessions who is in hand already, or unusual."""
    limit = LIMIT + LIMIT_EACH * len(files)
    usual = [client for client in files if client not in batch.run_by and not client.sharers]
    found, left = await lay_many(
        [client.pid for client in usual],
        [files[client] for client in usual],
        limit,
        spaces=[client.space for client in usual],
        known=[client.borrowed for client in usual],
        guard=batch.enforcer.guard,
    )
    door = batch.enforcer.placements
    outcomes: dict[Client, Exception | None] = {}
    bodies: dict[Client, Body[None]] = {}
    for index, client in enumerate(usual):
        if index in left:
            bodies[client] = laying(files[client], door, left[index])
        else:
            outcomes[client] = found[index]
            client.borrowed = client.borrowed or found[index] is None
    for client, theirs in files.items():
        if client not in bodies and client not in outcomes:
            bodies[client] = laying(theirs, door)
    outcomes.update(await batch.sessions(bodies, limit))
    return outcomes


async def _late(batch: Batch, wanted: Sequence[Demand]) -> dict[Client, Exception]:
    """Who is to be dealt with when its call ends, and will fail then, as can be seen now."""
    late = [c for c, windows in batch.late.items() if _maps(windows, Comparison(wanted))]
    if not late:
        return {}
    device = batch.enforcer.device

    def look() -> list[Exception | None]:
        return [obstacle(client.pid, device) for client in late]

    found = await trio.to_thread.run_sync(look)
    return {client: why for client, why in zip(late, found, strict=True) if why is not None}


def _to_lay(batch: Batch, wanted: Sequence[Demand]) -> dict[Client, list[Map]]:
    comparisons: dict[int, Comparison] = {}
    same: dict[int, list[Map]] = {}  # by windows, which forked clients share
    whole = batch.file.region.semantics.superset
    todo: dict[Client, list[Map]] = {}
    for client, windows in list(batch.windows.items()):
        maps = same.get(id(windows)) if whole else None
        if maps is None:
            try:
                parts = batch.parts(client)
            except Gone:
                batch.forget(client)
                continue
            maps = []
            for within, part in parts.items():
                comparison = comparisons.get(int(within))
                if comparison is None:
                    comparison = comparisons[int(within)] = Comparison(wanted, within=within)
                maps += _maps(part, comparison)
            same[id(windows)] = maps
        if maps:
            todo[client] = maps
    return todo


def _maps(windows: Iterable[MappedRange], comparison: Comparison) -> list[Map]:
    return [step for step in comparison.steps(windows) if isinstance(step, Map)]


def _plans(
    todo: dict[Client, list[Map]], windows: dict[Client, list[MappedRange]], device: int
) -> dict[Client, tuple[bytes, Ways] | Exception]:
    """In a thread: where each client sees the mount, and what it lays where."""
    plans: dict[Client, tuple[bytes, Ways] | Exception] = {}
    known: dict[Hashable, bytes] = {}
    for client, maps in todo.items():
        try:
            ways: Ways = {}
            for step, writable in zip(maps, _writable(client, windows[client], maps), strict=True):
                ways.setdefault((step.source, writable), []).append(step)
            plans[client] = mount_path(client.pid, device, known), ways
        except (NotAdoptable, Gone) as error:
            plans[client] = error
    return plans


def _writable(
    client: Client, windows: Sequence[MappedRange], maps: Sequence[Map]
) -> Iterable[bool]:
    """Whether the client may give itself the right to store, where each of ``maps`` goes."""
    ordered = sorted(windows, key=_start)
    starts = [window.start for window in ordered]
    known: dict[int, bool] = {}
    for step in maps:
        index = bisect_right(starts, step.address) - 1
        if index not in known:
            window = ordered[index]
            try:
                known[index] = bool(int(client.space.may(window)) & 2)
            except Gone:
                client.space.check()
                known[index] = bool(int(window.prot) & 2)  # it is just being changed by the client
        yield known[index]


def _start(window: MappedRange) -> int:
    return window.start


async def _fail(
    batch: Batch, maps: dict[Client, list[Map]], failures: dict[Client, Exception]
) -> None:
    """Leave those out who failed; and if it stays so, let them see nothing."""
    bodies: dict[Client, Body[None]] = {}
    for client, steps in maps.items():
        batch.windows.pop(client, None)
        if batch.shuts and not isinstance(failures[client], ClientStuck):
            shut = [Protect(step.address, step.size, PROTS[0]) for step in steps]
            bodies[client] = protecting(shut)
    await batch.sessions(bodies, LIMIT)


async def _look_again(batch: Batch, clients: Sequence[Client]) -> None:
    spaces = [client.space for client in clients]
    looks = await trio.to_thread.run_sync(files_of, spaces, batch.enforcer.device)
    for client, files in zip(clients, looks, strict=True):
        mapped = files.get(batch.file.ino) if files is not None else None
        if mapped:
            batch.windows[client] = mapped
        else:
            batch.forget(client)
