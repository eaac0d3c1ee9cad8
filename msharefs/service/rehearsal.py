"""A file that is to lie in a region is shown to the server itself first.

For: the errno of what nobody could be shown goes to the caller of CREATE_MAPPING, before any client
is touched; and how mappings of the file will be listed in ``/proc/PID/maps``, where overlayfs lists
its own file, is known before there are any (:attr:`~msharefs.memory.objects.FileObject.listed`).

Promises: each file is tried once, for as long as it lies in regions. Nothing is left mapped or open,
and the kernel is told to forget what it looked up for it. Does not hold up the loop; a caller that is
killed does not wait for it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msharefs.clients.lay import mount_path
from msharefs.clients.rehearse import listed_as
from msharefs.region.errors import NotAdoptable, ObjectFailed

if TYPE_CHECKING:
    from msharefs.abi import Prot
    from msharefs.memory.objects import FileObject
    from msharefs.service.nodes import RegionFile
    from msharefs.service.placements import Placements


async def rehearse(
    placements: Placements,
    device: int,
    file: RegionFile,
    shown: FileObject,
    prot: Prot,
    region_offset: int,
    object_offset: int,
) -> None:
    """Find out how ``shown`` will be listed where it is to lie in the region, by trying.

    ``device`` is the mount's ``st_dev``. Raises ObjectFailed with what open(2) or mmap(2) says, and
    NotAdoptable if the server does not see its own mount.
    """
    if shown.listed is not None:
        return
    source = (shown.ident, region_offset - object_offset)
    placement = placements.pin(file, source, writable=shown.writable)
    laid = placements.laid(placement, b"", ())

    def ended() -> None:
        placements.unpin(placement)
        if placement in placements.idle():
            placements.let_go(placement)

    def work() -> tuple[int, int]:
        try:
            path = mount_path(os.getpid(), device) + laid.path
        except NotAdoptable:
            raise NotAdoptable("the server itself does not see the mount") from None
        return listed_as(path, laid.inode, laid.flags, prot, object_offset, placements)

    try:
        shown.listed = await shown.in_thread(work, ended=ended)
    except OSError as error:
        code = error.errno or 0
        reason = f"{shown.path} cannot be passed through to others: {os.strerror(code)}"
        raise ObjectFailed(code, reason) from error
