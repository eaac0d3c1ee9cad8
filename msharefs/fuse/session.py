"""The life of a served mount: a device, a router and a pyfuse3 session, from start to unmount.

`serve` mounts and serves; `Session` serves a device that is mounted already, whoever did that.

Promises: whatever ends it (an unmount from outside, `Session.request_stop`, cancellation, a failure
at any step), no descriptor, thread or mount of ours is left, and nothing is closed while somebody
still uses it. A mount that is in use is detached then: its mappings live on, and what is called on
its open files afterwards fails with ENOTCONN or ECONNABORTED.

pyfuse3 keeps its session in module globals: one `Session` at a time in a process.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

import pyfuse3
import trio

from .mount import Mount, MountError, MountOptions, find_mounts, mount, mount_at, unmount
from .router import Router

if TYPE_CHECKING:
    from collections.abc import Callable

    from .handlers import Handlers

log = logging.getLogger(__name__)

_MIN_TASKS: Final = 4
"""pyfuse3's idle workers; it starts more as requests come, and ends those beyond this."""
_MAX_TASKS: Final = 1 << 16
"""pyfuse3 reads no request while this many handlers wait. Far more than the router hands over."""
_GRACE: Final = 1.0
"""Seconds for the kernel to end the connection after unmounting, and for handlers to return."""
_UNMOUNT_PATIENCE: Final = 10.0
"""Seconds for umount2(2), which may have to wait for writes to the mount."""


async def serve(
    operations: pyfuse3.Operations,
    mountpoint: str | os.PathLike[str],
    handlers: Handlers,
    *,
    source: str = "msharefs",
    options: MountOptions | None = None,
    on_ready: Callable[[Router], None] | None = None,
) -> None:
    """Mount on ``mountpoint`` and serve until it is unmounted or this is cancelled.

    ``on_ready`` is called when the kernel and we have agreed (`Router.connection`): from then on
    the mount answers. If it raises, that ends the mount, and the exception comes out of here.

    Raises `MountError` before anything was mounted; OSError if kernel and libfuse do not agree;
    and whatever, against the rules, comes out of an operation of pyfuse3.
    """
    device = mount(mountpoint, source=source, options=options)
    try:
        session = Session(operations, device, handlers, mountpoint=mountpoint)
    except BaseException:
        os.close(device)
        unmount(mountpoint, detach=True)
        raise
    await session.run(on_ready)


class Session:
    """Serves one connection. ``device`` is the session's from now on; `run` closes it.

    ``mountpoint``: unmounted when the session ends. None leaves unmounting to somebody else.
    """

    def __init__(
        self,
        operations: pyfuse3.Operations,
        device: int,
        handlers: Handlers,
        *,
        mountpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self._operations = operations
        self._device = device
        # By device number: the mount may be moved, or bound elsewhere, while we serve it.
        found = mount_at(mountpoint) if mountpoint is not None else None
        self._mount: Mount | None = found
        self._stop = trio.Event()
        self._done = trio.Event()
        self._library_done = trio.Event()
        self._library_running = False
        self._failure: BaseException | None = None
        self.router: Final = Router(device, handlers)

    def request_stop(self) -> None:
        """Unmount, lazily if it is in use, and end `run`. May be called at any time, repeatedly."""
        self._stop.set()

    async def run(self, on_ready: Callable[[Router], None] | None = None) -> None:
        """Serve until the end. Once. See `serve` for what it raises."""
        try:
            mountpoint = self.router.downstream.give_away()
            pyfuse3.init(self._operations, mountpoint, set())  # mount options are mount(2)'s
            self._library_running = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_shielded, on_ready)
                try:
                    await self._done.wait()
                finally:
                    self.request_stop()  # cancelled: end in good order, which takes serving
        finally:
            with trio.CancelScope(shield=True):
                await self._close()
        if self._failure is not None:
            raise self._failure

    async def _serve_shielded(self, on_ready: Callable[[Router], None] | None) -> None:
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run_library)
                    nursery.start_soon(self._announce, on_ready)
                    nursery.start_soon(self._obey_stop)
                    await self._run_router()
                    pyfuse3.terminate()
                    with trio.move_on_after(_GRACE):
                        await self._library_done.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._done.set()

    async def _run_router(self) -> None:
        try:
            await self.router.run()
        except Exception as exc:  # noqa: BLE001 - comes out of run() when all is closed
            self._fail(exc)

    async def _run_library(self) -> None:
        try:
            await pyfuse3.main(min_tasks=_MIN_TASKS, max_tasks=_MAX_TASKS)
        except Exception as exc:
            log.exception("an operation of the file system raised what it must not; unmounting")
            self._fail(exc)
        finally:
            self._library_done.set()
            # Nobody answers what the router forwards from here on: fail it, so that unmounting
            # does not wait for an answer.
            self.router.library_failed()
            self.request_stop()

    async def _announce(self, on_ready: Callable[[Router], None] | None) -> None:
        await self.router.ready.wait()
        if on_ready is None:
            return
        try:
            on_ready(self.router)
        except Exception as exc:  # noqa: BLE001 - comes out of run() when all is closed
            self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        if self._failure is None:
            self._failure = exc
        self.request_stop()

    async def _obey_stop(self) -> None:
        await self._stop.wait()
        if self.router.gone is None:
            detached = [await self._unmount(found) for found in self._mounts()]
            if detached and not any(detached):
                with trio.move_on_after(_GRACE):
                    await self.router.ended.wait()
        self.router.stop()

    def _mounts(self) -> list[Mount]:
        """Where our file system is mounted in this namespace, the last one first."""
        if self._mount is None:
            return []
        device, fstype = self._mount.device, self._mount.fstype
        return [m for m in reversed(find_mounts(fstype)) if m.device == device]

    async def _unmount(self, found: Mount) -> bool:
        """Whether it had to be detached. In threads: the kernel may ask us something meanwhile."""
        with trio.move_on_after(_UNMOUNT_PATIENCE, shield=True):
            try:
                await trio.to_thread.run_sync(unmount, found.mountpoint, abandon_on_cancel=True)
            except MountError as exc:
                if exc.errno != errno.EBUSY:
                    log.warning("%s", exc)
                    return False
            else:
                return False
        log.info("%s is in use: detaching it", found.mountpoint)
        with trio.move_on_after(_UNMOUNT_PATIENCE, shield=True):
            await trio.to_thread.run_sync(self._detach, found, abandon_on_cancel=True)
        return True

    def _detach(self, found: Mount) -> None:
        try:
            unmount(found.mountpoint, detach=True)
        except MountError as exc:
            if exc.errno != errno.EINVAL:  # somebody else was faster
                log.error("%s", exc)

    async def _close(self) -> None:
        """Everything in the order in which nobody uses it any more."""
        router = self.router
        if self._library_running:
            pyfuse3.close(unmount=False)
        else:
            router.downstream.take_back()
        await router.notifier.aclose()
        # With ENODEV the file system is gone, and its device number may be another one's.
        left = self._mounts() if router.gone != errno.ENODEV else []
        if router.gone is None:
            router.backing.clear()
        router.downstream.close()
        os.close(self._device)
        for found in left:
            self._detach(found)
