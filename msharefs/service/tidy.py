"""Files that nobody is shown any more are let go of.

For: the objects of regions. The kernel keeps the name of a file that it has looked up although
nobody has it open or mapped, for as long as it has memory; so the file would stay pinned. As soon
as a placement is probably in nobody's address space any more the kernel is told to drop its name;
what it then still maps stays until it is unmapped, and is listed as "(deleted)" in /proc/PID/maps.

Promises: nothing is told while a change of the region is under way, nor of what the region's table
shows to somebody. Costs nothing while nothing changes.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import trio

from msharefs.region.demand import source_of
from msharefs.service.errors import errno_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from msharefs.clients.roster import Roster
    from msharefs.clients.shown import Shown
    from msharefs.region.demand import Source
    from msharefs.service.changes import RegionState
    from msharefs.service.nodes import RegionFile
    from msharefs.service.placements import Placement, Placements

PAUSE: Final = 0.05
"""Seconds between a reason to tidy up and the tidying, which many reasons share."""


class Tidy:
    """Finds placements that are not needed, when there is a reason to look."""

    def __init__(
        self, placements: Placements, roster: Roster, state: Callable[[RegionFile], RegionState]
    ) -> None:
        self._placements = placements
        self._roster = roster
        self._state = state
        self._reason = trio.Event()

    def soon(self) -> None:
        """Somebody may be shown less than before."""
        if len(self._placements):
            self._reason.set()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._reason.wait()
            await trio.sleep(PAUSE)
            self._reason = trio.Event()
            self._look()
            try:
                await self._look_at_everybody()
            except Exception as error:  # noqa: BLE001 - the next one may go better
                errno_of(error, "looking who is still shown files")

    def _look(self) -> None:
        shown: dict[RegionFile, set[Source]] = {}
        for placement in self._placements.idle():
            file = placement.file
            if self._state(file).lock.locked():
                self._reason.set()  # it comes to its end soon
                continue
            if file not in shown:
                shown[file] = self._shown(file)
            if placement.shown.source not in shown[file]:
                self._placements.let_go(placement)

    async def _look_at_everybody(self) -> None:
        """For placements whose mappings do not keep them: only looking tells whether there are any."""
        shown: dict[RegionFile, set[Source]] = {}
        todo: list[Placement] = []
        for placement in self._placements.elsewhere():
            file = placement.file
            if file not in shown:
                shown[file] = self._shown(file)
            if (
                placement.shown.source not in shown[file]
                or len(placement.shifts) > placement.crowded
            ):
                todo.append(placement)
        if not todo:
            return
        since = self._placements.placed.changes
        await self._roster.survey(full=True)
        seen: dict[Shown, set[int]] = {}
        for client in self._roster:
            for mapped in itertools.chain.from_iterable(client.files.values()):
                if mapped.shown is not None:
                    shift = mapped.start - mapped.offset + mapped.shown.delta
                    seen.setdefault(mapped.shown, set()).add(shift)
        for placement in todo:
            if not placement.pins:
                self._placements.keep_only(placement, seen.get(placement.shown, ()), since)

    def _shown(self, file: RegionFile) -> set[Source]:
        """What is shown in the region to anybody; memory, too, by who had it given back."""
        if not self._roster.of_region(file.ino):
            return set()
        files = (source_of(mapping) for mapping in file.region.table)
        return {None, *files} if file.region.table.files else {None}
