"""The memory of one mount: makes backing files, keeps the limit, knows what is used.

The limit counts memory that *may* be touched: every byte mapped as anonymous memory is reserved
when it is mapped, so that a full mount shows as ENOSPC from CREATE_MAPPING and never as SIGBUS in
a program that touches what it was given. Without a limit nothing is reserved and the machine's
own memory is the bound, as for memfd_create(2).

With a limit or a huge-page policy the files live on a tmpfs of the mount's own, whose size is the
limit as well: what programs touch outside of any mapping cannot exceed it either. So they do where
a gate has to tell this mount's memory from any other: all memfds of the system are on one device.
"""

from __future__ import annotations

import os
from typing import Self

import attrs
import psutil

from msharefs.memory import tmpfs
from msharefs.memory.backing import Backing
from msharefs.region.errors import NoSpace


@attrs.frozen
class Usage:
    """Bytes. ``total`` is the limit or the machine's memory; ``free`` what may still be mapped."""

    total: int
    free: int


@attrs.define(eq=False)
class Store:
    """Use :meth:`open`; close it when the mount has gone."""

    limit: int | None
    _directory: int
    reserved: int = 0

    @classmethod
    def open(
        cls, *, limit: int | None = None, huge: str | None = None, own_device: bool = False
    ) -> Self:
        """``limit`` in bytes, ``huge`` one of :data:`tmpfs.HUGE_POLICIES`.

        ``own_device``: on a device number of the mount's own, whatever the options.

        Raises OSError if the kernel cannot make such a tmpfs.
        """
        if limit is None and huge is None and not own_device:
            return cls(None, -1)
        # Without a limit the machine's memory is the bound, not the half of it that a tmpfs has.
        options = {"mode": "0700", "size": "0" if limit is None else str(limit)}
        if huge is not None:
            options["huge"] = huge
        return cls(limit, tmpfs.open_detached(options))

    @property
    def device(self) -> int | None:
        """The st_dev of the memory, where it is this mount's alone."""
        return os.fstat(self._directory).st_dev if self._directory >= 0 else None

    def new_backing(self, name: str) -> Backing:
        """An empty file. ``name`` shows in /proc/PID/fd of the daemon and is only for people."""
        if self._directory >= 0:
            return Backing(tmpfs.unnamed_file(self._directory))
        label = f"msharefs:{name}".encode()[:249]
        return Backing(_memfd(label.decode(errors="ignore")))

    def reserve(self, size: int) -> None:
        """Count ``size`` more bytes (fewer if negative). Raises NoSpace and counts nothing."""
        wanted = self.reserved + size
        if self.limit is not None and size > 0 and wanted > self.limit:
            raise NoSpace(
                f"{size} bytes more than the {self.limit - self.reserved} left of size={self.limit}"
            )
        self.reserved = wanted

    def usage(self) -> Usage:
        """What statfs(2) should say."""
        if self.limit is None:
            memory = psutil.virtual_memory()
            return Usage(memory.total, memory.available)
        tmpfs_free = os.fstatvfs(self._directory)
        free = min(self.limit - self.reserved, tmpfs_free.f_bavail * tmpfs_free.f_frsize)
        return Usage(self.limit, max(free, 0))

    def close(self) -> None:
        if self._directory >= 0:
            fd, self._directory = self._directory, -1
            os.close(fd)


def _memfd(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC)
