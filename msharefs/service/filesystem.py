"""The namespace as pyfuse3 serves it.

For: translating between requests (inode numbers, handles, attributes) and the objects of
``nodes.py``, ``control.py``, ``handles.py`` and ``changes.py``. Nothing is decided here that one
of those could decide; errors of every kind pass through ``errors.py``. What is answered to the
router is not here: reading, writing and the ioctls of open files (``files.py``, ``ioctls.py``),
and names, attributes and opening as far as they concern regions (``naming.py``).
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo

from msharefs.abi import PAGE_SIZE
from msharefs.region.events import Event, EventKind
from msharefs.service import control
from msharefs.service.control import ControlNode, ControlTree, Slot, Standing
from msharefs.service.errors import (
    IsADirectory,
    NotALink,
    NotOpenForThat,
    Reserved,
    errno_of,
    guarded,
)
from msharefs.service.handles import (
    DirectoryHandle,
    EventsHandle,
    Handle,
    Handles,
    TextHandle,
)
from msharefs.service.naming import actor_of
from msharefs.service.nodes import (
    CONTROL_NAME,
    INFO_INO,
    INFO_NAME,
    NAME_MAX,
    OBJECTS_INO,
    OBJECTS_NAME,
    ROOT_INO,
    Directory,
    Namespace,
    Node,
    RegionFile,
    Special,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyfuse3 import (
        ReaddirToken,
        RequestContext,
        SetattrFields,
        StatvfsData,
    )

    from msharefs.fuse.attributes import Attributes
    from msharefs.memory.store import Store
    from msharefs.service.changes import Changes
    from msharefs.service.holds import Holds
    from msharefs.service.naming import Opens
    from msharefs.service.placements import Placement


@guarded
class Filesystem(pyfuse3.Operations):
    """One mount's operations."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        namespace: Namespace,
        handles: Handles,
        changes: Changes,
        store: Store,
        holds: Holds,
        opens: Opens,
    ) -> None:
        super().__init__()
        self._names = namespace
        self._control = ControlTree(namespace)
        self._opens = opens
        self._handles = handles
        self._changes = changes
        self._store = store
        self._holds = holds
        self.standing: Callable[[int, int], Standing | None] = lambda _ino, _pid: Standing()
        """How a process stands to a region; set where that is known."""

    # -- names

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        parent = self._control.node(parent_inode)
        if parent is not None:
            return self._control_attributes(self._control.lookup(parent, name))
        directory = self._names.directory(parent_inode)
        if directory is self._names.root:
            special = self._control.in_root(name)
            if special is not None:
                return self._control_attributes(special)
            if name == OBJECTS_NAME and self._opens.placements is not None:
                return _entry_of(self._opens.placement_attributes(None))
        return self._entry(self._names.lookup(directory, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, lookups in inode_list:
            self._names.forget(ino, lookups)

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._directory(parent_inode)
        if stat.S_ISREG(mode) and not self._names.semantics.by_mknod:
            raise Reserved("mknod() makes no regions here; open() does")
        make = self._names.create_region if stat.S_ISREG(mode) else self._names.make_special
        return self._entry(make(directory, name, mode, ctx.uid, ctx.gid))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._directory(parent_inode)
        mode = stat.S_IFLNK | 0o777
        return self._entry(
            self._names.make_special(directory, name, mode, ctx.uid, ctx.gid, target)
        )

    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        node = self._names.node(inode)
        if not isinstance(node, Special) or not stat.S_ISLNK(node.mode):
            raise NotALink(node.path)
        return node.target

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._directory(parent_inode)
        return self._entry(self._names.make_directory(directory, name, mode, ctx.uid, ctx.gid))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        directory = self._directory(parent_inode)
        self._names.drop_if_dead(self._names.remove_directory(directory, name))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old, new = self._directory(parent_inode_old), self._directory(parent_inode_new)
        paths = {node: node.path for node in (old.entries.get(name_old),) if node is not None}
        moved, replaced = self._names.rename(old, name_old, new, name_new, flags)
        if isinstance(replaced, RegionFile):
            self._opens.unlinked(replaced, replaced.region.name, ctx.pid, "rename")
        elif replaced is not None:
            self._names.drop_if_dead(replaced)
        if isinstance(moved, RegionFile):
            detail = (("old", paths[moved]),)
            actor = actor_of(ctx.pid)
            self._changes.tell(
                moved, Event(EventKind.RENAME, moved.path, actor, "rename", detail=detail)
            )

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._directory(new_parent_inode)
        node = self._node(inode)
        self._names.link(node, directory, new_name)
        return self._entry(node)

    # -- attributes

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        special = self._control.node(inode)
        if special is not None:
            return self._control_attributes(special)
        if inode == OBJECTS_INO or self._placement(inode) is not None:
            return _entry_of(self._opens.placement_attributes(self._placement(inode)))
        return self._attributes(self._names.node(inode))

    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        if fields.update_size:
            file = self._names.region_file(inode)
            self._changes.follow(file)
            via = "truncate" if fh is None else "ftruncate"
            await self._changes.resize(file, attr.st_size, actor_of(ctx.pid), via)
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_atime:
            node.atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
            if isinstance(node, RegionFile):
                node.written_ns = node.backing.state[1]
        node.ctime_ns = time.time_ns()
        return self._attributes(node)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        usage = self._store.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = PAGE_SIZE
        answer.f_blocks = usage.total // PAGE_SIZE
        answer.f_bfree = answer.f_bavail = usage.free // PAGE_SIZE
        answer.f_files = answer.f_ffree = answer.f_favail = 0  # no limit, as btrfs says it
        answer.f_namemax = NAME_MAX
        return answer

    # -- directories

    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        special = self._control.node(inode)
        if special is not None:
            entries = [(name, child.ino) for name, child in self._control.children(special)]
            parent = self._control.parent_ino(special)
        elif inode == OBJECTS_INO:
            entries, parent = [], ROOT_INO
        else:
            directory = self._names.directory(inode)
            entries = [(name, node.ino) for name, node in directory.entries.items()]
            parent = directory.links[0][0].ino if directory.links else directory.ino
            if directory is self._names.root:
                made_up = (INFO_NAME, CONTROL_NAME)
                entries[:0] = [
                    (name, node.ino)
                    for name in made_up
                    if (node := self._control.in_root(name)) is not None
                ]
        return self._handles.add(DirectoryHandle([(b".", inode), (b"..", parent), *entries]))

    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        handle = self._handles.get(fh)
        if not isinstance(handle, DirectoryHandle):
            raise NotOpenForThat("not a directory")
        for index in range(start_id, len(handle.entries)):
            name, ino = handle.entries[index]
            try:
                special = self._control.node(ino)
                if special is not None:
                    entry = self._control_attributes(special)
                    node = None
                else:
                    node = self._names.node(ino)
                    entry = self._attributes(node)
            except Exception as error:  # noqa: BLE001 - removed since opendir(): not listed
                errno_of(error, "readdir")
                continue
            if not pyfuse3.readdir_reply(token, name, entry, index + 1):
                return
            if node is not None and name not in {b".", b".."}:
                node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        self._handles.remove(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing here outlives the mount."""

    # -- files

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        special = self._control.node(inode)
        if special is not None:
            return _file_info(self._handles.add(await self._open_control(special)))
        file = self._names.region_file(inode)
        number = self._opens.open(file, flags, ctx.pid)
        if flags & os.O_TRUNC and (file.region.size or file.region.semantics.sized_once):
            try:
                actor = self._handles.region(number).actor(ctx.pid)
                await self._changes.resize(file, 0, actor, "open")
            except BaseException:
                self._opens.close(number)
                raise
        return _file_info(number)

    async def release(self, fh: int) -> None:
        self._opens.close(fh)

    # -- helpers

    def _node(self, ino: int) -> Node:
        """A node that a user may change. Raises Reserved for those that the mount makes up."""
        if self._is_made_up(ino):
            raise Reserved("belongs to the mount")
        return self._names.node(ino)

    def _directory(self, ino: int) -> Directory:
        if self._is_made_up(ino):
            raise Reserved("belongs to the mount")
        return self._names.directory(ino)

    def _is_made_up(self, ino: int) -> bool:
        if ino == OBJECTS_INO or self._placement(ino) is not None:
            return True
        return self._control.node(ino) is not None

    def _placement(self, ino: int) -> Placement | None:
        placements = self._opens.placements
        return None if placements is None else placements.get(ino)

    def _attributes(self, node: Node) -> EntryAttributes:
        return _entry_of(self._opens.attributes(node))

    def _entry(self, node: Node) -> EntryAttributes:
        """Attributes in a reply that gives the kernel one more reference to the node."""
        node.lookups += 1
        return self._attributes(node)

    async def _open_control(self, node: ControlNode) -> Handle:
        if node.ino == INFO_INO:
            return TextHandle(control.info_text(self._names.semantics.alignment))
        if node.is_directory:
            raise IsADirectory("a control directory")
        if node.slot is Slot.EVENTS:
            region = node.owner if isinstance(node.owner, RegionFile) else None
            self._holds.opened(region)
            return EventsHandle(self._changes.new_reader(region), region)
        file = node.owner
        if not isinstance(file, RegionFile):
            raise IsADirectory("a control directory")
        self._changes.follow(file)
        if node.slot is Slot.MAPS:
            mappings = tuple(file.region.table)
            return TextHandle(control.maps_text(mappings, self._changes.objects))
        if node.slot is Slot.STATS:
            return TextHandle(control.stats_text(file, self._changes.state(file)))
        found = await trio.to_thread.run_sync(self._changes.census, file.ino)
        return TextHandle(control.clients_text(found, lambda pid: self.standing(file.ino, pid)))

    def _control_attributes(self, node: ControlNode) -> EntryAttributes:
        entry = EntryAttributes()
        owner = node.owner
        entry.st_ino = node.ino
        entry.st_mode = node.mode
        entry.st_nlink = 2 if node.is_directory else 1
        entry.st_uid, entry.st_gid = owner.uid, owner.gid
        entry.st_atime_ns = entry.st_mtime_ns = owner.mtime_ns
        entry.st_ctime_ns = owner.ctime_ns
        entry.st_blksize = PAGE_SIZE
        if node.ino == INFO_INO:
            entry.st_size = sum(map(len, control.info_text(self._names.semantics.alignment)))
        # Such a node comes and goes with its owner, without the kernel knowing why.
        entry.entry_timeout = entry.attr_timeout = 0
        return entry


def _entry_of(found: Attributes) -> EntryAttributes:
    entry = EntryAttributes()
    entry.st_ino = found.ino
    entry.st_mode = found.mode
    entry.st_nlink = found.nlink
    entry.st_uid, entry.st_gid = found.uid, found.gid
    entry.st_size, entry.st_blocks = found.size, found.blocks
    entry.st_blksize = found.block_size
    entry.st_atime_ns, entry.st_mtime_ns = found.atime_ns, found.mtime_ns
    entry.st_ctime_ns = found.ctime_ns
    entry.entry_timeout, entry.attr_timeout = found.name_holds_ns / 1e9, found.holds_ns / 1e9
    return entry


def _file_info(number: int) -> FileInfo:
    return FileInfo(fh=number, direct_io=True)
