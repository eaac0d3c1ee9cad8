"""Backing ids: which file the kernel maps, reads and writes in place of an inode of ours.

The kernel knows a backing file by an id that BACKING_OPEN gives for a descriptor (its
Documentation/filesystems/fuse-passthrough.rst). An inode has one backing file for as long as it is
open in passthrough mode anywhere; a second one is refused with EBUSY. So there is one id per node,
and it is counted by the open files that were given it.
"""

from __future__ import annotations

import fcntl
import logging
import struct
from collections import Counter
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from .wire import BACKING_MAP

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_BACKING_OPEN: Final = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE: Final = 0x4004E502  # _IOW(229, 2, uint32_t)


class BackingDevice(Protocol):
    """Where backing ids come from; the FUSE device, but in tests."""

    def open(self, fd: int) -> int:
        """An id for the file that ``fd`` is open on; the descriptor may be closed afterwards.

        Raises OSError: EPERM (needs CAP_SYS_ADMIN in the initial user namespace), EBADF, ELOOP
        (too many file systems stacked below), EOPNOTSUPP.
        """

    def close(self, backing_id: int) -> None:
        """Give an id back. Files that were opened with it keep their backing file."""


@attrs.frozen
class FuseBacking:
    """The ids of a mount, by ioctl on its device."""

    device: int

    def open(self, fd: int) -> int:
        # The id is ioctl's return value, and fcntl.ioctl gives that for a mutable argument only.
        argument = bytearray(BACKING_MAP.pack(fd, 0, 0))
        return int(fcntl.ioctl(self.device, _BACKING_OPEN, argument))

    def close(self, backing_id: int) -> None:
        fcntl.ioctl(self.device, _BACKING_CLOSE, struct.pack("<I", backing_id))


@attrs.define
class _Node:
    backing_id: int
    opens: Counter[int] = attrs.Factory(Counter)  # by file handle


class BackingTable:
    """The backing id of each node that is open in passthrough mode, and who holds it."""

    def __init__(self, device: BackingDevice) -> None:
        self._device = device
        self._nodes: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __contains__(self, nodeid: int) -> bool:
        return nodeid in self._nodes

    def acquire(self, nodeid: int, fh: int, fd: int) -> int:
        """The backing id for an open ``fh`` of ``nodeid``: a new one of ``fd``, or the one it has.

        Raises OSError as `BackingDevice.open`; nothing is held then.
        """
        node = self._nodes.get(nodeid)
        if node is None:
            node = self._nodes[nodeid] = _Node(self._device.open(fd))
        node.opens[fh] += 1
        return node.backing_id

    def release(self, nodeid: int, fh: int) -> None:
        """An open ``fh`` of ``nodeid`` has ended. Does nothing for one that held no id."""
        node = self._nodes.get(nodeid)
        if node is None or fh not in node.opens:
            return
        node.opens[fh] -= 1
        if not node.opens[fh]:
            del node.opens[fh]
        if not node.opens:
            del self._nodes[nodeid]
            self._close(node.backing_id)

    def clear(self) -> None:
        """Give back every id: the connection ends."""
        nodes = list(self._nodes.values())
        self._nodes.clear()
        for node in nodes:
            self._close(node.backing_id)

    def _close(self, backing_id: int) -> None:
        try:
            self._device.close(backing_id)
        except OSError as exc:
            # The id then lives as long as the connection; nobody is harmed but the memory.
            log.warning("cannot give back backing id %d: %s", backing_id, exc)
