"""Notifications to the kernel, written by a thread of their own.

A notification (invalidate an entry, store data, ...) may wait in the kernel for an inode or page
lock that is held for a request only the loop can answer. Written from the loop it would wait for
ever; so a thread writes them, in order. It starts with the first notification.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
from collections import Counter
from typing import Final

import trio

from .wire import OUT_HEADER

log = logging.getLogger(__name__)

_PATIENCE: Final = 5.0
"""Seconds for the last notification to return, once the connection has ended."""


class Notifier:
    """The queue and its thread. ``errors`` counts (notification code, errno) that came back."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.errors: Counter[tuple[int, int]] = Counter()

    def send(self, frame: bytes) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fuse-notify", daemon=True)
            self._thread.start()
        self._queue.put(frame)

    async def aclose(self) -> None:
        """End the thread. Only after the requests in flight have been answered or aborted."""
        if self._thread is None:
            return
        self._queue.put(None)
        await trio.to_thread.run_sync(self._thread.join, _PATIENCE)
        if self._thread.is_alive():
            log.error("a notification to the kernel does not return; its thread is left behind")
        self._thread = None

    def _run(self) -> None:
        while (frame := self._queue.get()) is not None:
            try:
                os.write(self._device, frame)
            except OSError as exc:
                code = OUT_HEADER.unpack_from(frame)[1]
                self.errors[code, exc.errno or errno.EIO] += 1
                # ENOENT: the kernel had nothing cached. Normal.
                log.debug("notification %d: %s", code, exc)
