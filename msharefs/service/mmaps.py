"""mmap() of a region, as the lsm gate asks about it: before the mapping exists.

The caller waits inside mmap() for the verdict; an exception here is the errno that it gets. What
the rules say of any mapping is judged at once. Whether the caller can be made to obey the table is
for ``admit`` to find out: it may stop the thread, which then halts when its mmap() is done.

Promises: a question is never given up half-way. A signal to the caller (the one that stops it for
``admit`` is one) does not make mmap() fail with EINTR, which no program expects of it. ``admit``
keeps its own deadline.

Leaves out: files of the mount that are no regions; they may be mapped as their driver allows.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, TypeAlias

import pyfuse3
import trio

from msharefs.clients.gate_lsm import spell
from msharefs.clients.identity import identify
from msharefs.region.errors import PrivateMapping, RegionError
from msharefs.service.errors import NoSuchAttribute, errno_of
from msharefs.units import errno_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from msharefs.abi import Prot
    from msharefs.clients.gate import Mmap
    from msharefs.fuse.wire import GetxattrRequest
    from msharefs.service.changes import Changes
    from msharefs.service.nodes import Namespace, RegionFile
    from msharefs.service.placements import Placements

    Admit: TypeAlias = Callable[[RegionFile, int, Prot], Awaitable[None] | None]
    """(region, id of the calling thread, protection of the mapping): raises to refuse it."""

GO_ON: Final = b""
"""The program looks at the error alone."""


def admit_all(_file: RegionFile, _tid: int, _prot: Prot) -> None:
    """Nobody is made to obey anything."""


class Mmaps:
    """Answers FUSE_GETXATTR of a mount that has an lsm gate.

    ``question`` reads the names by which the gate asks; all others are attributes that no file
    here has. ENOSYS would be the shorter answer, but it makes the kernel ask no more.
    """

    def __init__(
        self,
        namespace: Namespace,
        changes: Changes,
        question: Callable[[bytes], Mmap | None],
        admit: Admit = admit_all,
        placements: Placements | None = None,
    ) -> None:
        self._namespace = namespace
        self._changes = changes
        self._question = question
        self._admit = admit
        self._placements = placements

    def getxattr(self, request: GetxattrRequest) -> bytes | Awaitable[bytes]:
        """The handler. Raises NoSuchAttribute, or the verdict as FUSEError."""
        asked = self._question(request.name)
        if asked is None:
            raise NoSuchAttribute(repr(request.name))
        file = self._namespace.find_region(request.nodeid)
        if file is None:
            return self._judge_placement(request)
        try:
            if asked.private and file.region.lets_private:
                return GO_ON
            if asked.private:
                raise PrivateMapping("mmap() with MAP_PRIVATE: only MAP_SHARED is a share")  # noqa: TRY301 - a refusal like all others
            file.region.check_mmap(asked.prot)
            waiting = self._admit(file, request.pid, asked.prot)
        except Exception as error:
            raise self._refusal(file, request.pid, error) from error
        return GO_ON if waiting is None else self._finish(file, request.pid, waiting)

    def _judge_placement(self, request: GetxattrRequest) -> bytes:
        """What lies in ``.objects/`` is mapped by those who are made to, and by nobody else."""
        placements = self._placements
        if placements is None or placements.get(request.nodeid) is None:
            return GO_ON
        if placements.may_map(request.pid, request.nodeid):
            return GO_ON
        raise pyfuse3.FUSEError(spell(errno.EACCES))

    async def _finish(self, file: RegionFile, tid: int, waiting: Awaitable[None]) -> bytes:
        with trio.CancelScope(shield=True):
            try:
                await waiting
            except Exception as error:
                raise self._refusal(file, tid, error) from error
        return GO_ON

    def _refusal(self, file: RegionFile, tid: int, error: Exception) -> pyfuse3.FUSEError:
        code = errno_of(error, "mmap")
        if isinstance(error, RegionError):
            self._changes.refuse(file, identify(tid), "mmap", errno_name(code), str(error))
        return pyfuse3.FUSEError(spell(code))
