"""The ioctls of a region: from a decoded request to a planned change, and back.

Checks stand in this order: the file has that command (ENOTTY), the descriptor may change the
table (EACCES), then the arguments as ``region/`` judges them. A refusal by a rule is told to the
event log with its reason, since an errno says little.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import attrs
import trio

from msharefs.abi import (
    PAGE_SIZE,
    PROT_ALL,
    Args,
    Command,
    CreateArgs,
    Feature,
    Gate,
    InfoArgs,
    MapFlag,
    NotifyArgs,
    NotifyEvent,
    NotifyFlag,
    NotifyMode,
    OnTimeout,
    ProtectArgs,
    QueryArgs,
    QueryFlag,
    SyncArgs,
    UnmapArgs,
)
from msharefs.clients.identity import duplicate_descriptor
from msharefs.fuse.handlers import IoctlReply
from msharefs.memory.examine import examine
from msharefs.region.errors import BadArgument, NothingThere, RegionError, Unsupported
from msharefs.region.events import Event, EventKind
from msharefs.region.mapping import PROTS
from msharefs.region.pages import page_down, page_up
from msharefs.region.semantics import MSHARE
from msharefs.service.errors import NotAnIoctl, errno_of
from msharefs.service.handles import DirectoryHandle, RegionHandle
from msharefs.service.rehearsal import rehearse
from msharefs.units import errno_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.fuse.wire import IoctlRequest
    from msharefs.memory.examine import Examined
    from msharefs.memory.objects import FileObject
    from msharefs.region.events import Actor
    from msharefs.region.mapping import Change
    from msharefs.region.semantics import Semantics
    from msharefs.service.changes import Changes
    from msharefs.service.contents import Contents
    from msharefs.service.handles import Handles
    from msharefs.service.nodes import RegionFile

    Notify: TypeAlias = Callable[[RegionFile, NotifyArgs, Actor], Awaitable[None]]

DONE: Final = IoctlReply()
SIGNAL_MAX: Final = 64

_Args = TypeVar("_Args", bound=Args)
_COMMANDS: Final = {int(command): command for command in Command}
_NEXT: Final = int(QueryFlag.NEXT)


class Ioctls:
    """Answers FUSE_IOCTL.

    ``notify`` watches a range, if the mount can; ``region_devices`` tells which devices hold
    regions, to refuse nesting.
    """

    def __init__(
        self,
        handles: Handles,
        changes: Changes,
        contents: Contents,
        *,
        features: Feature,
        gate: Gate = Gate.NONE,
        notify: Notify | None = None,
        region_devices: Callable[[], frozenset[int]],
        semantics: Semantics = MSHARE,
    ) -> None:
        self._handles = handles
        self._changes = changes
        self._contents = contents
        self._features = features
        self._gate = gate
        self._watch = notify
        self._region_devices = region_devices
        self._semantics = semantics
        self._handlers: dict[
            Command,
            Callable[[RegionHandle, bytes, int], IoctlReply | Awaitable[IoctlReply]],
        ] = {
            Command.CREATE_MAPPING: self._create_mapping,
            Command.CREATE_MAPPING_I386: self._create_mapping,
            Command.UNMAP: self._unmap,
            Command.PROTECT: self._protect,
            Command.QUERY: self._query,
            Command.NOTIFY: self._notify,
            Command.SYNC: self._sync,
            Command.INFO: self._info,
        }

    def __call__(self, request: IoctlRequest) -> IoctlReply | Awaitable[IoctlReply]:
        """Raises what :func:`~msharefs.service.errors.errno_of` can translate."""
        command = _COMMANDS.get(request.cmd)
        handle = self._handles.get(request.fh)
        if command not in self._semantics.commands:
            if self._semantics.sized_once and isinstance(handle, RegionHandle):
                handle.file.region.check_sized()  # which is looked at before the command is
            raise NotAnIoctl(f"ioctl {request.cmd:#x}")
        assert command is not None, "it is one that regions have"
        if not isinstance(handle, RegionHandle):
            if command is Command.INFO and isinstance(handle, DirectoryHandle):
                return self._info_of(0)
            raise NotAnIoctl(f"{command.name} of something that is no region")
        self._changes.follow(handle.file)
        try:
            outcome = self._handlers[command](handle, request.data, request.pid)
        except RegionError as error:
            self._refused(handle, command, request.pid, error)
            raise
        if isinstance(outcome, IoctlReply):
            return outcome
        return self._finish(handle, command, request.pid, outcome)

    async def _finish(
        self, handle: RegionHandle, command: Command, tid: int, outcome: Awaitable[IoctlReply]
    ) -> IoctlReply:
        enforcer = self._changes.enforcer
        try:
            if enforcer is not None:
                return await enforcer.debts.while_waiting(handle.actor(tid), outcome)
            return await outcome
        except RegionError as error:
            self._refused(handle, command, tid, error)
            raise

    def _refused(
        self, handle: RegionHandle, command: Command, tid: int, error: RegionError
    ) -> None:
        if isinstance(error, NothingThere):
            return  # how a program walks the table to its end, not a refusal
        code = errno_name(errno_of(error, command.name))
        via = command.name.removesuffix("_I386")
        self._changes.refuse(handle.file, handle.actor(tid), via, code, str(error))

    # -- changes

    def _create_mapping(
        self, handle: RegionHandle, data: bytes, tid: int
    ) -> IoctlReply | Awaitable[IoctlReply]:
        args = _unpack(CreateArgs, data)
        region = handle.file.region
        region.check_sized()
        region.check_may_change(handle.access)
        if not args.flags & MapFlag.ANONYMOUS:
            return self._map_object(handle, args, tid)
        prot = args.prot
        detail = (("prot", PROTS[prot & 7].text()),)
        return self._change(
            handle,
            tid,
            EventKind.MAP,
            args.region_offset,
            args.size,
            detail,
            lambda: region.plan_map(args.region_offset, args.size, prot, args.flags),
        )

    def _map_object(
        self, handle: RegionHandle, args: CreateArgs, tid: int
    ) -> Awaitable[IoctlReply]:
        handle.file.region.check_map(args.region_offset, args.size, args.prot, args.flags)
        if handle.file.region.semantics.as_mmap:
            offset, size, prot = page_down(args.offset), page_up(args.size), args.prot & PROT_ALL
            args = attrs.evolve(args, offset=offset, size=size, prot=prot)
        if args.offset % PAGE_SIZE:
            raise BadArgument(f"object offset {args.offset:#x} is not a multiple of {PAGE_SIZE}")
        if args.offset + args.size >= 1 << 63:
            raise BadArgument(f"object offset {args.offset:#x} plus the size overflows")
        return self._show_object(handle, args, tid)

    async def _show_object(self, handle: RegionHandle, args: CreateArgs, tid: int) -> IoctlReply:
        found = await self._examined(args, tid)
        if not self._features & Feature.FILE_OBJECTS:
            found.discard()
            raise Unsupported("with -o gate=none nobody could be shown a file: mount without that")
        objects, region = self._changes.objects, handle.file.region
        shown = objects.take(found)
        try:
            await self._rehearse(handle.file, shown, args)
            detail = (
                ("prot", PROTS[args.prot].text()),
                ("object", shown.path),
                ("object_offset", args.offset),
            )
            outcome = self._change(
                handle,
                tid,
                EventKind.MAP,
                args.region_offset,
                args.size,
                detail,
                lambda: region.plan_map(
                    args.region_offset,
                    args.size,
                    args.prot,
                    args.flags,
                    obj=shown.ref,
                    object_offset=args.offset,
                    max_prot=shown.max_prot,
                ),
            )
            return outcome if isinstance(outcome, IoctlReply) else await outcome
        finally:
            objects.release(shown.ident)

    async def _rehearse(self, file: RegionFile, shown: FileObject, args: CreateArgs) -> None:
        enforcer = self._changes.enforcer
        if enforcer is None:
            return
        prot, placements, device = PROTS[args.prot], enforcer.placements, enforcer.device
        await rehearse(placements, device, file, shown, prot, args.region_offset, args.offset)

    async def _examined(self, args: CreateArgs, tid: int) -> Examined:
        """In a thread: the object's filesystem is asked, which may be dead, or this very mount.

        A caller that is killed does not wait for it.
        """
        found: list[Examined] = []
        lock, given_up = threading.Lock(), False

        def examined() -> None:
            fd = duplicate_descriptor(tid, args.fd)
            result = examine(fd, PROTS[args.prot], args.offset, self._region_devices)
            with lock:
                if not given_up:
                    found.append(result)
                    return
            result.discard()

        try:
            await trio.to_thread.run_sync(
                examined, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        except BaseException:
            with lock:
                given_up = True
            for result in found:
                result.discard()
            raise
        return found[0]

    def _unmap(
        self, handle: RegionHandle, data: bytes, tid: int
    ) -> IoctlReply | Awaitable[IoctlReply]:
        args = _unpack(UnmapArgs, data)
        region = handle.file.region
        region.check_sized()
        region.check_may_change(handle.access)
        return self._change(
            handle,
            tid,
            EventKind.UNMAP,
            args.region_offset,
            args.size,
            (),
            lambda: region.plan_unmap(args.region_offset, args.size),
        )

    def _protect(
        self, handle: RegionHandle, data: bytes, tid: int
    ) -> IoctlReply | Awaitable[IoctlReply]:
        args = _unpack(ProtectArgs, data)
        region = handle.file.region
        region.check_sized()
        region.check_may_change(handle.access)
        return self._change(
            handle,
            tid,
            EventKind.PROTECT,
            args.region_offset,
            args.size,
            (("prot", PROTS[args.prot & 7].text()),),
            lambda: region.plan_protect(args.region_offset, args.size, args.prot, args.flags),
        )

    def _change(
        self,
        handle: RegionHandle,
        tid: int,
        kind: EventKind,
        offset: int,
        length: int,
        detail: tuple[tuple[str, str | int], ...],
        plan: Callable[[], Change],
    ) -> IoctlReply | Awaitable[IoctlReply]:
        file = handle.file
        event = Event(kind, file.region.name, handle.actor(tid), "ioctl", offset, length, detail)
        pending = self._changes.change(file, plan, event)
        return DONE if pending is None else _then_done(pending)

    # -- looking

    def _query(self, handle: RegionHandle, data: bytes, _tid: int) -> IoctlReply:
        args = _unpack(QueryArgs, data)
        region = handle.file.region
        region.check_sized()
        if args.query_flags & ~_NEXT or args.reserved:
            raise BadArgument("unknown query_flags, or a reserved field that is not zero")
        found = region.query(args.region_offset, or_next=bool(args.query_flags & _NEXT))
        answer = QueryArgs(
            region_offset=args.region_offset,
            query_flags=args.query_flags,
            start=found.start,
            size=found.size,
            object_offset=found.object_offset,
            object_ino=found.object.ino,
            object_dev_major=found.object.dev_major,
            object_dev_minor=found.object.dev_minor,
            prot=int(found.prot),
            map_flags=found.flags,
            kind=found.object.kind,
        )
        return IoctlReply(data=answer.pack())

    def _info(self, handle: RegionHandle, _data: bytes, _tid: int) -> IoctlReply:
        return self._info_of(handle.file.region.size)

    def _info_of(self, size: int) -> IoctlReply:
        """Also of a directory, and before a region has its size: one needs the alignment then."""
        answer = InfoArgs(
            gate=self._gate,
            features=int(self._features),
            alignment=self._semantics.alignment,
            region_size=size,
        )
        return IoctlReply(data=answer.pack())

    # -- watching, syncing

    def _notify(
        self, handle: RegionHandle, data: bytes, tid: int
    ) -> IoctlReply | Awaitable[IoctlReply]:
        args = _unpack(NotifyArgs, data)
        region = handle.file.region
        region.check_sized()
        region.check_may_change(handle.access)
        region.check_range(args.region_offset, args.size)
        _check_notify(args)
        if self._watch is None:
            raise Unsupported("this mount does not watch ranges: it has no gate")
        return _then_done(self._watch(handle.file, args, handle.actor(tid)))

    def _sync(self, handle: RegionHandle, data: bytes, tid: int) -> Awaitable[IoctlReply]:
        args = _unpack(SyncArgs, data)
        end = handle.file.region.check_range(args.region_offset, args.size)
        if args.flags or args.reserved:
            raise BadArgument("flags and reserved must be zero")
        if not self._features & Feature.FILE_OBJECTS:
            raise Unsupported(
                "with -o gate=none no files lie in regions, so there is nothing to sync"
            )
        return _then_done(self._contents.sync(handle, args.region_offset, end, tid))


def _check_notify(args: NotifyArgs) -> None:
    """What needs no region. A field that the mode has no use for must be zero, as flags must."""
    if args.events & ~int(NotifyEvent.WRITE | NotifyEvent.READ) or args.flags & ~int(
        NotifyFlag.SCAN
    ):
        raise BadArgument("unknown events or flags")
    if args.flags & NotifyFlag.SCAN and (args.events, args.mode) != (
        NotifyEvent.WRITE,
        NotifyMode.LOG,
    ):
        raise BadArgument("nothing but stores, in mode log, can be scanned for")
    if args.mode not in set(NotifyMode) or args.on_timeout not in set(OnTimeout):
        raise BadArgument(f"unknown mode {args.mode} or on_timeout {args.on_timeout}")
    if args.mode == NotifyMode.SIGNAL:
        if not 1 <= args.signo <= SIGNAL_MAX:
            raise BadArgument(f"signal {args.signo} does not exist")
    elif args.signo:
        raise BadArgument(f"signo {args.signo} without the mode that sends a signal")
    if args.mode != NotifyMode.HOLD and (args.timeout_ms or args.on_timeout):
        raise BadArgument("timeout_ms or on_timeout without the mode that holds")


async def _then_done(pending: Awaitable[None]) -> IoctlReply:
    await pending
    return DONE


def _unpack(kind: type[_Args], data: bytes) -> _Args:
    try:
        return kind.unpack(data)
    except struct.error:
        raise BadArgument(f"{len(data)} bytes are no {kind.NAME}") from None
