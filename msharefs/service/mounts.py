"""Mounts seen from outside their server: unmounting one, and who keeps it busy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from msharefs.fuse.mount import MountError, unmount

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MountError", "unmount", "users"]


def users(path: str) -> Iterator[str]:
    """Who keeps the mount busy, as far as /proc tells: ``comm (pid)``."""
    inside = (path, path.rstrip("/") + "/")
    for process in psutil.process_iter():
        try:
            names = [process.cwd(), *(file.path for file in process.open_files())]
            names += [mapped.path for mapped in process.memory_maps()]
        except (psutil.Error, OSError):
            continue
        if any(name == inside[0] or name.startswith(inside[1]) for name in names):
            yield f"{process.name()} ({process.pid})"
