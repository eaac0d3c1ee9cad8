"""Who maps a region is met at the gate: the verdict on its mmap(), and its adoption.

For: both kinds of gate. The *ptrace* gate holds whoever opens a region until its first mmap() of
that descriptor (``clients/holding.py``); the *lsm* gate asks when mmap() is called
(``service/mmaps.py``), and the caller is then taken in hand at the end of that call. In either case
the thread stops right after the mapping was made and before its program knows of it, the process is
made a replica of the region's table, and the thread is let go.

What becomes of one that cannot be adopted is the mount's policy: ``enforce=strict`` refuses the
open() or mmap() (EPERM), ``enforce=best`` lets it in and lists it as unenforced. Into a region that
shows a file nobody is let in who does not obey, for he would see memory where the file belongs: if
that comes out when the mapping is made already, it is unmapped again and mmap() fails.

When it dies: the opener, at any step: nothing is left of it. The server: the kernel lets go of
everybody, mmap() goes on unsupervised.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs
import trio

from msharefs.clients.arch import ADDRESS_END
from msharefs.clients.gone import Gone
from msharefs.clients.holding import Limits
from msharefs.clients.identity import hindrance, identify
from msharefs.clients.lay import unmapping
from msharefs.clients.placing import asked_mmap, moving, taken
from msharefs.clients.procmap import MappedRange
from msharefs.clients.ptrace import Busy
from msharefs.region.errors import BadArgument, NoRoom, NotAdoptable, PrivateMapping, RegionError
from msharefs.region.events import Event, EventKind
from msharefs.region.mapping import PROTS
from msharefs.region.pages import page_up
from msharefs.region.window import Wanted, check_window, place, placed, rounded_up
from msharefs.service.errors import errno_of
from msharefs.service.nodes import RegionFile
from msharefs.units import errno_name

if TYPE_CHECKING:
    from msharefs.abi import Prot
    from msharefs.clients.holding import Held, MmapCall
    from msharefs.region.events import Actor
    from msharefs.service.changes import Changes
    from msharefs.service.enforce import Enforcer

log = logging.getLogger(__name__)

LIMITS: Final = Limits()
MAP_PRIVATE: Final = 0x02
MAP_TYPE: Final = 0x0F
MAX_ERRNO: Final = 4095


class Gatekeeper:
    """Attends to those who come through the gate. ``nursery``: where it does so."""

    def __init__(self, enforcer: Enforcer, changes: Changes, nursery: trio.Nursery) -> None:
        self._enforcer = enforcer
        self._changes = changes
        self._nursery = nursery

    async def hold(self, file: RegionFile, actor: Actor) -> None:
        """An opener waits for our answer: hold it until it maps the region.

        To be answered when this returns. Raises NotAdoptable if it is not to be let in.
        """
        with trio.CancelScope(shield=True):  # being stopped looks like a signal to its open()
            self._enforcer.look_around()
            held = await self._take(file, actor, "open", LIMITS)
            if held is not None:
                self._nursery.start_soon(self._attend, held, actor)

    async def admit(self, file: RegionFile, tid: int, prot: Prot) -> None:
        """The caller of an mmap() that the rules allow: adopt it at the end of that call.

        Raises what ``check_window`` does.
        """
        actor = identify(tid)
        wanted = None
        if file.region.semantics.whole:
            wanted = await asked_mmap(tid)
            if wanted is not None:
                check_window(file.region, wanted)
                _check_movable(wanted)
        held = await self._take(file, actor, "mmap", None)
        if held is not None:
            self._nursery.start_soon(self._attend_one, held, file, actor, prot, wanted)

    async def _take(
        self, file: RegionFile, actor: Actor, via: str, limits: Limits | None
    ) -> Held | None:
        """The thread in hand; None if it goes its way unsupervised."""
        held = self._enforcer.hands.of_thread(actor.tid)
        if held is not None:  # it opens another region meanwhile
            if limits is not None:
                held.opening(file)
            return None
        try:
            if not actor.pid:
                raise NotAdoptable("the process lives in a foreign pid namespace")  # noqa: TRY301
            if reason := hindrance(actor.tid):
                raise NotAdoptable(reason)  # noqa: TRY301
            held = self._enforcer.hands.take(actor.tid, actor.pid, limits, file)
            await held.placed()
        except (Gone, Busy):  # Busy: it was let go of late, while it went on
            return None
        except NotAdoptable as error:
            if self._enforcer.strict or file.region.table.files:
                self._changes.refuse(file, actor, via, "EPERM", str(error))
                raise
            self._tell_unenforced(file, actor, via, error)
            return None
        return held

    def _tell_unenforced(self, file: RegionFile, actor: Actor, via: str, error: Exception) -> None:
        detail = (("reason", str(error)),)
        self._changes.tell(
            file, Event(EventKind.UNENFORCED, file.region.name, actor, via, detail=detail)
        )

    # -- ptrace

    async def _attend(self, held: Held, actor: Actor) -> None:
        try:
            while (call := await held.at_mmap()) is not None:
                await self._at_mmap(held, actor, call)
            self._enforcer.look_around()  # it may map the region later, or its child
        except Gone:
            return
        except NotAdoptable as error:
            log.info("process %d: %s", actor.pid, error)
            self._enforcer.look_around()
        except Exception as error:  # noqa: BLE001 - one process's affair
            errno_of(error, f"process {actor.pid} at the gate")
        finally:
            held.release()

    async def _at_mmap(self, held: Held, actor: Actor, call: MmapCall) -> None:
        file = call.what
        assert isinstance(file, RegionFile), "what hold() gave"
        placed = None
        try:
            self._judge(file, call)
            if file.region.semantics.whole:
                placed = call = await _placed(file, actor.pid, call)
        except RegionError as error:
            code = errno_of(error, "mmap")
            self._changes.refuse(file, actor, "mmap", errno_name(code), str(error))
            await held.refuse(code)
            return
        if call.flags & MAP_TYPE == MAP_PRIVATE:
            await held.allow()  # a copy; nothing here reaches it
        else:
            await self._admit(held, file, actor, call, placed)
        held.release()

    @staticmethod
    def _judge(file: RegionFile, call: MmapCall) -> None:
        if call.flags & MAP_TYPE == MAP_PRIVATE:
            if not file.region.lets_private:
                raise PrivateMapping("mmap() with MAP_PRIVATE: only MAP_SHARED is a share")
            return
        file.region.check_mmap(PROTS[call.prot & 7])
        if file.region.semantics.whole:
            check_window(file.region, _wanted(call))

    async def _admit(
        self, held: Held, file: RegionFile, actor: Actor, call: MmapCall, placed: MmapCall | None
    ) -> None:
        roster = self._enforcer.roster
        client = roster.add(actor.pid, [file.ino])
        async with client.lock:
            roster.add(actor.pid, [file.ino])  # a change may have looked, and seen no mapping yet
            attached = client.regions[file.ino]
            attached.arriving = True
            try:
                address = await held.allow(placed)
            finally:
                attached.arriving = False
                client.met += 1  # who looked before the mapping was made has seen nothing
            if -MAX_ERRNO <= address < 0:
                if not attached.declared:
                    roster.detach(client, file.ino)
                return
            end = address + page_up(call.length)
            prot = PROTS[call.prot & 7]
            window = MappedRange(actor.pid, address, end, prot, True, call.offset, file.ino)
            await self._adopt(held, file, actor, window, prot)

    # -- lsm

    async def _attend_one(
        self, held: Held, file: RegionFile, actor: Actor, prot: Prot, wanted: Wanted | None
    ) -> None:
        try:
            address = await held.stopped()
            if -MAX_ERRNO <= address < 0:
                return
            if wanted is not None and not wanted.exact:
                address = await _moved(held, file, actor.pid, address, wanted)
                if address < 0:
                    return
            client = self._enforcer.roster.add(actor.pid, [file.ino])
            async with client.lock:
                windows = client.space.windows(self._enforcer.device, file.ino)
                for window in windows:
                    if window.start <= address < window.end:
                        await self._adopt(held, file, actor, window, prot)
        except Gone:
            return
        except Exception as error:  # noqa: BLE001 - one process's affair
            errno_of(error, f"process {actor.pid} at the gate of {file.region.name}")
        finally:
            held.release()

    async def _adopt(
        self, held: Held, file: RegionFile, actor: Actor, window: MappedRange, prot: Prot
    ) -> None:
        enforcer = self._enforcer
        client = enforcer.roster.of_pid(actor.pid)
        if client is None or file.ino not in client.regions:
            return
        if not file.region.semantics.limited:
            prot = client.space.may(window)
        client.regions[file.ino].declare(window.start, window.end, prot)
        try:
            await enforcer.admit(file, client, window, held.run)
        except Gone:
            enforcer.roster.forget(client)
        except Exception as error:  # noqa: BLE001 - listed; a change will try again
            if not isinstance(error, RegionError | OSError):
                errno_of(error, f"adopting process {actor.pid}")
            if file.region.table.files:
                await self._take_back(held, file, actor, window, error)
                return
            enforcer.unenforced(file, client, error)
        else:
            where = (("address", f"{window.start:#x}"), ("prot", prot.text()))
            size = window.end - window.start
            enforcer.tell(
                file,
                Event(
                    EventKind.ADOPT,
                    file.region.name,
                    actor,
                    "mmap",
                    window.offset,
                    size,
                    where,
                ),
            )

    async def _take_back(
        self, held: Held, file: RegionFile, actor: Actor, window: MappedRange, error: Exception
    ) -> None:
        """The mapping that was just made goes again, and its mmap() fails."""
        code = errno_of(error, f"mmap of {file.region.name}")
        self._changes.refuse(file, actor, "mmap", errno_name(code), str(error))
        try:
            await held.run(unmapping(window.start, window.end - window.start))
        except (NotAdoptable, OSError) as failure:
            log.warning("process %d keeps a mapping that does not obey: %s", actor.pid, failure)
            client = self._enforcer.roster.of_pid(actor.pid)
            if client is not None:
                self._enforcer.unenforced(file, client, error)
            return
        held.replace(window.start, -code)
        self._enforcer.look_around()


# -- where a region lies, on mounts that have a say in it


def _wanted(call: MmapCall) -> Wanted:
    return Wanted(call.address, call.length, call.flags, call.offset)


async def _placed(file: RegionFile, pid: int, call: MmapCall) -> MmapCall:
    """The call as it is to be made. Raises NoRoom, Gone."""
    wanted = _wanted(call)
    address = wanted.address if wanted.exact else await _find_place(file, pid, wanted)
    made = placed(wanted, address)
    return attrs.evolve(call, address=made.address, flags=made.flags, offset=made.offset)


async def _find_place(file: RegionFile, pid: int, wanted: Wanted) -> int:
    mapped = await trio.to_thread.run_sync(taken, pid)
    return place(wanted, file.region.semantics.alignment, mapped, ADDRESS_END)


def _check_movable(wanted: Wanted) -> None:
    """What the gate that does not see the call being made cannot have made in another way."""
    if wanted.touches:
        raise NoRoom("MAP_POPULATE or MAP_LOCKED would take memory for all of the region")
    if wanted.offset:
        raise BadArgument(f"mmap() from offset {wanted.offset:#x}: a region is mapped as a whole")


async def _moved(held: Held, file: RegionFile, pid: int, result: int, wanted: Wanted) -> int:
    """Where the mapping lies then: where it was, if that is right or it cannot be moved.

    Or minus an errno, if there is no room for it and it is there no more.
    """
    size, alignment = file.region.size, file.region.semantics.alignment
    address, hint = result, rounded_up(wanted.address, alignment)
    while True:
        mapped = await trio.to_thread.run_sync(taken, pid)
        others = [part for part in mapped if part[1] <= address or part[0] >= address + size]
        try:
            to = place(wanted, alignment, others, ADDRESS_END)
            if to == address or (not address % alignment and to != hint):
                break
            if abs(to - address) < size:  # nothing is moved over itself: by way of another place
                to = place(attrs.evolve(wanted, address=0), alignment, mapped, ADDRESS_END)
            if not await held.run(moving(result, address, size, to)):
                break
        except FileExistsError:  # another thread was there first
            continue
        except NoRoom as error:
            await held.run(unmapping(address, size))
            code = errno_of(error, "mmap")
            held.replace(result, -code)
            return -code
        address = to
    if address != result:
        held.replace(result, address)
    return address
