"""The life of a mount: put the parts together, serve, clean up.

When it ends: unmounted from outside, SIGINT or SIGTERM (unmounts; lazily if it is in use). What
outlives it: programs that map a region keep their memory until they unmap it or end. If the
process is killed instead, the mount point answers ENOTCONN until ``umount -l``; mappings go on
working all the same.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import resource
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from msharefs.abi import Command, Feature, Gate
from msharefs.clients.census import MappedRange, mapped_ranges
from msharefs.clients.gate import GateUnavailable
from msharefs.clients.policy import Enforce
from msharefs.clients.shown import NOTHING
from msharefs.clients.tracer import prepare_process
from msharefs.fuse.handlers import FORWARD, Forward, Handlers
from msharefs.fuse.mount import MountOptions as KernelOptions
from msharefs.fuse.mount import find_mounts, mount, mount_at, unmount
from msharefs.fuse.session import Session
from msharefs.memory.store import Store
from msharefs.service import systemd
from msharefs.service.changes import Changes
from msharefs.service.contents import Contents
from msharefs.service.enforcement import Enforcement
from msharefs.service.errors import errno_of
from msharefs.service.eventlog import EventLog
from msharefs.service.files import Files
from msharefs.service.filesystem import Filesystem
from msharefs.service.gates import open_gate
from msharefs.service.handles import Handles
from msharefs.service.ioctls import Ioctls
from msharefs.service.mmaps import Mmaps
from msharefs.service.naming import Naming, Opens
from msharefs.service.nodes import Namespace
from msharefs.service.notifications import Notifications
from msharefs.service.placements import Placements
from msharefs.service.ranges import Ranges

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.abi import Prot
    from msharefs.clients.gate_lsm import LsmGate
    from msharefs.clients.shown import Placed
    from msharefs.fuse.router import Router
    from msharefs.fuse.wire import GetxattrRequest
    from msharefs.region.events import Actor
    from msharefs.service.files import Hold
    from msharefs.service.gates import Opened
    from msharefs.service.ioctls import Notify
    from msharefs.service.nodes import RegionFile
    from msharefs.service.options import MountOptions

log = logging.getLogger(__name__)

HAND_OVER: Final = 0.0005
"""Seconds that a thread back from the kernel waits for the interpreter while another one works.
Ten times less than usual: whoever asked for a change waits for it too."""

FEATURES = Feature.PROTECT | Feature.QUERY | Feature.EVENTS


def run(mountpoint: str, options: MountOptions, *, ready: Callable[[], None]) -> None:
    """Mount and serve until SIGINT, SIGTERM or an unmount from outside. Blocks.

    ``ready`` is called once the mount answers. Raises OSError with one readable line if it cannot
    be mounted.
    """
    _allow_many_files()
    sys.setswitchinterval(HAND_OVER)
    prepare_process()  # before the first thread
    try:
        lenient = options.enforce is Enforce.BEST
        gate = open_gate(
            options.gate,
            lenient=lenient,
            private=options.private,
            whole=options.semantics.whole,
        )
    except GateUnavailable as error:
        raise OSError(errno.EOPNOTSUPP, f"gate={options.gate}: {error}") from error
    try:
        store = _open_store(options, own_device=gate.lsm is not None)
        try:
            trio.run(_serve, mountpoint, options, store, gate, ready)
        finally:
            store.close()
    finally:
        if gate.lsm is not None:
            gate.lsm.close()


async def _serve(
    mountpoint: str,
    options: MountOptions,
    store: Store,
    gate: Opened,
    ready: Callable[[], None],
) -> None:
    kernel_options = KernelOptions(read_only=options.read_only, noexec=options.noexec)
    device = mount(mountpoint, source=options.source, options=kernel_options)
    try:
        found = mount_at(mountpoint)
        assert found is not None, "the mount is in the table from mount(2) on"
        number = os.makedev(*found.device)
        changes = Changes(store, EventLog(options.events), census=_census_of(number))
        namespace = Namespace(
            root_mode=options.root_mode,
            uid=options.uid,
            gid=options.gid,
            new_backing=store.new_backing,
            dropped=changes.dispose,
            semantics=options.semantics,
        )
        handles = Handles()
        notifications = Notifications(changes, namespace.find_region)
        enforcement, placements = None, None
        if gate.kind is not Gate.NONE:
            placements = Placements(namespace, changes.objects, number)
            changes.census = _census_of(number, placements.placed)
            enforcement = Enforcement(
                number, options, changes, notifications, namespace.find_region, placements, gate.lsm
            )
        hold = _hold(enforcement, gate.kind)
        contents = Contents(changes)
        files = Files(handles, changes, contents, notifications, namespace.leaving, hold)
        ranges = Ranges(handles, changes, contents, files)
        features = FEATURES | (Feature(0) if options.semantics.no_huge else Feature.HUGE)
        if enforcement is not None:
            features |= Feature.ENFORCE | Feature.NOTIFY | Feature.FILE_OBJECTS
            changes.changed = notifications.changed
        features &= ~_lacking(options.semantics.commands)
        ioctls = Ioctls(
            handles,
            changes,
            contents,
            features=features,
            gate=gate.kind,
            notify=_notify(enforcement, notifications),
            region_devices=_region_devices,
            semantics=options.semantics,
        )
        opens = Opens(namespace, handles, changes, notifications.holds, placements)
        naming = Naming(namespace, opens)
        operations = Filesystem(namespace, handles, changes, store, notifications.holds, opens)
        if enforcement is not None:
            operations.standing = enforcement.standing
        handlers = Handlers(
            ioctl=ioctls,
            fallocate=ranges.fallocate,
            read=files.read,
            write=files.write,
            fsync=ranges.fsync,
            poll=files.poll,
            seek=ranges.seek,
            copy=ranges.copy,
            opened=files.opened,
            lookup=naming.lookup,
            getattr=naming.getattr,
            create=naming.create,
            open=naming.open,
            unlink=naming.unlink,
            released=opens.close,
            forget=naming.forget,
            getxattr=_gated(enforcement, namespace, changes),
            errno_of=errno_of,
        )
        if gate.lsm is not None:
            # Nobody can have opened anything yet: the mount does not answer before it is served.
            memory = store.device
            assert memory is not None, "the memory of a gated mount is on a device of its own"
            gate.lsm.add_mount(number, memory)
        session = Session(operations, device, handlers, mountpoint=mountpoint)
        if enforcement is not None:
            enforcement.placements.drop_name = session.router.drop_name
    except BaseException:
        os.close(device)
        unmount(mountpoint, detach=True)
        raise  # the tracer is a daemon thread that holds nobody yet

    def announce(_router: Router) -> None:
        gc.freeze()  # what is here stays: keep it out of every later collection
        log.info("mounted on %s", mountpoint)
        systemd.notify(READY="1", STATUS=f"serving {mountpoint}", MAINPID=str(os.getpid()))
        ready()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, session, gate.lsm)
            await nursery.start(notifications.holds.run)
            if gate.lsm is not None:
                nursery.start_soon(_unwatch_at_end, session, gate.lsm)
            if enforcement is not None:
                await nursery.start(enforcement.run)
            await session.run(announce)
            nursery.cancel_scope.cancel()
    finally:
        if enforcement is not None:
            enforcement.close()
        handles.clear()
        if enforcement is not None:
            enforcement.placements.clear()
        namespace.clear()
    log.info("unmounted %s", mountpoint)


async def _stop_on_signal(
    session: Session,
    gate: LsmGate | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        task_status.started()
        async for number in received:
            log.info("%s: unmounting", signal.Signals(number).name)
            systemd.notify(STOPPING="1")
            if gate is not None:
                gate.remove_mount()
            session.request_stop()


async def _unwatch_at_end(session: Session, gate: LsmGate) -> None:
    """Somebody has unmounted it: the next mount may get its device number."""
    await session.router.ended.wait()
    gate.remove_mount()


def _census_of(device: int, placed: Placed = NOTHING) -> Callable[[int], list[MappedRange]]:
    return lambda ino: mapped_ranges(device, ino, placed=placed)


def _notify(enforcement: Enforcement | None, notifications: Notifications) -> Notify | None:
    """What NOTIFY does; nothing is caught on a mount without a gate."""
    if enforcement is None:
        return None
    return partial(notifications.notify, reach=enforcement.enforcer)


def _hold(enforcement: Enforcement | None, kind: Gate) -> Hold | None:
    """What is done about openers: the ptrace gate holds them."""
    if enforcement is None or kind is not Gate.PTRACE:
        return None

    def hold(file: RegionFile, actor: Actor) -> Awaitable[None]:
        assert enforcement.gatekeeper is not None, "there before the mount answers"
        return enforcement.gatekeeper.hold(file, actor)

    return hold


def _lacking(commands: frozenset[Command]) -> Feature:
    """The features that have no command on this kind of mount."""
    by_command = {
        Command.PROTECT: Feature.PROTECT,
        Command.QUERY: Feature.QUERY,
        Command.NOTIFY: Feature.NOTIFY,
    }
    lacking = Feature(0)
    for command, feature in by_command.items():
        if command not in commands:
            lacking |= feature
    return lacking


def _gated(
    enforcement: Enforcement | None, namespace: Namespace, changes: Changes
) -> Callable[[GetxattrRequest], bytes | Awaitable[bytes] | Forward]:
    """The handler of FUSE_GETXATTR. Without an lsm gate the kernel is told once: there is none."""
    if enforcement is None or enforcement.lsm is None:
        return lambda _request: FORWARD

    def admit(file: RegionFile, tid: int, prot: Prot) -> Awaitable[None]:
        assert enforcement.gatekeeper is not None, "there before the mount answers"
        return enforcement.gatekeeper.admit(file, tid, prot)

    mmaps = Mmaps(namespace, changes, enforcement.lsm.question, admit, enforcement.placements)
    return mmaps.getxattr


def _region_devices() -> frozenset[int]:
    return frozenset(os.makedev(*found.device) for found in find_mounts())


def _open_store(options: MountOptions, *, own_device: bool) -> Store:
    try:
        return Store.open(limit=options.memory_limit, huge=options.huge, own_device=own_device)
    except OSError as error:
        hint = {
            errno.EPERM: "needs root (CAP_SYS_ADMIN)",
            errno.EINVAL: "this kernel's tmpfs does not take it",
            errno.ENOSYS: "needs Linux 5.2 or newer",
        }.get(error.errno or 0, str(error))
        raise OSError(error.errno, f"cannot make the memory for size= or huge=: {hint}") from error


def _allow_many_files() -> None:
    """A region costs a descriptor, and a census one for a moment."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
