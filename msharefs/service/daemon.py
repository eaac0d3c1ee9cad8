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
from typing import TYPE_CHECKING

import trio

from msharefs.abi import Feature, Gate
from msharefs.clients.census import MappedRange, mapped_ranges
from msharefs.clients.gate import GateUnavailable
from msharefs.fuse.handlers import FORWARD, Forward, Handlers
from msharefs.fuse.mount import MountOptions as KernelOptions
from msharefs.fuse.mount import find_mounts, mount, mount_at, unmount
from msharefs.fuse.session import Session
from msharefs.memory.store import Store
from msharefs.service import systemd
from msharefs.service.changes import Changes
from msharefs.service.errors import errno_of
from msharefs.service.eventlog import EventLog
from msharefs.service.files import Files
from msharefs.service.filesystem import Filesystem
from msharefs.service.gates import open_gate
from msharefs.service.handles import Handles
from msharefs.service.ioctls import Ioctls
from msharefs.service.mmaps import Mmaps
from msharefs.service.nodes import Namespace
from msharefs.service.notifications import Notifications

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.clients.gate_lsm import LsmGate
    from msharefs.fuse.router import Router
    from msharefs.fuse.wire import GetxattrRequest
    from msharefs.service.options import MountOptions

log = logging.getLogger(__name__)

FEATURES = Feature.PROTECT | Feature.QUERY | Feature.EVENTS


def run(mountpoint: str, options: MountOptions, *, ready: Callable[[], None]) -> None:
    """Mount and serve until SIGINT, SIGTERM or an unmount from outside. Blocks.

    ``ready`` is called once the mount answers. Raises OSError with one readable line if it cannot
    be mounted.
    """
    _allow_many_files()
    try:
        gate = open_gate(options.gate, private=options.private)
    except GateUnavailable as error:
        raise OSError(errno.EOPNOTSUPP, f"gate={options.gate}: {error}") from error
    try:
        store = _open_store(options, own_device=gate is not None)
        try:
            trio.run(_serve, mountpoint, options, store, gate, ready)
        finally:
            store.close()
    finally:
        if gate is not None:
            gate.close()


async def _serve(
    mountpoint: str,
    options: MountOptions,
    store: Store,
    gate: LsmGate | None,
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
        notifications = Notifications(changes, namespace.region_or_none)
        files = Files(handles, changes, notifications, namespace.leaving)
        features = FEATURES | (Feature.HUGE if options.huge not in {None, "never"} else Feature(0))
        ioctls = Ioctls(
            handles,
            changes,
            features=features,
            gate=gate.kind if gate is not None else Gate.NONE,
            region_devices=_region_devices,
        )
        operations = Filesystem(namespace, handles, changes, store, notifications.holds)
        handlers = Handlers(
            ioctl=ioctls,
            fallocate=files.fallocate,
            read=files.read,
            write=files.write,
            seek=files.seek,
            copy=files.copy,
            opened=files.opened,
            released=operations.close,
            getxattr=_gated(gate, namespace, changes),
            errno_of=errno_of,
        )
        if gate is not None:
            # Nobody can have opened anything yet: the mount does not answer before it is served.
            memory = store.device
            assert memory is not None, "the memory of a gated mount is on a device of its own"
            gate.add_mount(number, memory)
        session = Session(operations, device, handlers, mountpoint=mountpoint)
    except BaseException:
        os.close(device)
        unmount(mountpoint, detach=True)
        raise

    def announce(_router: Router) -> None:
        gc.freeze()  # what is here stays: keep it out of every later collection
        log.info("mounted on %s", mountpoint)
        systemd.notify(READY="1", STATUS=f"serving {mountpoint}", MAINPID=str(os.getpid()))
        ready()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, session, gate)
            await nursery.start(notifications.holds.run)
            if gate is not None:
                nursery.start_soon(_unwatch_at_end, session, gate)
            await session.run(announce)
            nursery.cancel_scope.cancel()
    finally:
        handles.clear()
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


def _census_of(device: int) -> Callable[[int], list[MappedRange]]:
    return lambda ino: mapped_ranges(device, ino)


def _gated(
    gate: LsmGate | None, namespace: Namespace, changes: Changes
) -> Callable[[GetxattrRequest], bytes | Awaitable[bytes] | Forward]:
    """The handler of FUSE_GETXATTR. Without a gate the kernel is told once that there is none."""
    if gate is None:
        return lambda _request: FORWARD
    return Mmaps(namespace, changes, gate.question).getxattr


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
