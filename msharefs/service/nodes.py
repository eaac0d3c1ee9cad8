"""The namespace: directories, regions and their names. Synchronous, no FUSE.

For: who is called what, and when a node has really gone. A node is dropped once it has no name,
no open descriptor and no reference of the kernel's (lookup count); its memory goes with it.

Inode numbers: 1 is the root, 2 ``mshare_info`` (as in the kernel series), 3 and 4 ``.control``
and its ``events``, 5 ``.objects`` (``service/placements.py``). Other nodes get multiples of 8, so that each has numbers for its own control
directory and files (``service/control.py``) without any table of them.

Leaves out: permissions (the kernel checks them), what lies inside a region.
"""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.region.region import Region
from msharefs.region.semantics import MSHARE
from msharefs.service.errors import (
    BadRename,
    IsADirectory,
    NameTaken,
    NameTooLong,
    NoSuchName,
    NotADirectory,
    NotEmpty,
    Reserved,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from msharefs.memory.backing import Backing
    from msharefs.region.semantics import Semantics

ROOT_INO: Final = 1
INFO_INO: Final = 2
CONTROL_INO: Final = 3
CONTROL_EVENTS_INO: Final = 4
OBJECTS_INO: Final = 5
INO_STEP: Final = 8
FIRST_INO: Final = 16

NAME_MAX: Final = 255
INFO_NAME: Final = b"mshare_info"
CONTROL_NAME: Final = b".control"
OBJECTS_NAME: Final = b".objects"
RESERVED_NAMES: Final = frozenset({INFO_NAME, CONTROL_NAME, OBJECTS_NAME, b"events"})
"""Names in the root directory that no user may make or remove. ``events`` is among them because
``.control/events`` is the mount's own stream."""

_SPECIAL_TYPES: Final = frozenset({stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK})
"""Devices are not among them: the mount is nodev."""

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2


@attrs.define(eq=False)
class Node:
    """What directories and regions share. Times in nanoseconds since the epoch."""

    ino: int
    mode: int
    uid: int
    gid: int
    atime_ns: int = attrs.field(factory=time.time_ns)
    mtime_ns: int = attrs.field(factory=time.time_ns)
    ctime_ns: int = attrs.field(factory=time.time_ns)
    links: list[tuple[Directory, bytes]] = attrs.field(factory=list)
    """Every (directory, name) that leads here; the first gives the node its path."""
    lookups: int = 0
    opens: int = 0

    def touch(self, *, content: bool = True) -> None:
        """Something changed: ctime, and mtime if the content did."""
        self.ctime_ns = time.time_ns()
        if content:
            self.mtime_ns = self.ctime_ns

    @property
    def nlink(self) -> int:
        """How many names lead here."""
        return len(self.links)

    @property
    def size(self) -> int:
        """What stat(2) says, in bytes."""
        return 0

    @property
    def alive(self) -> bool:
        return bool(self.links or self.lookups or self.opens)

    @property
    def path(self) -> str:
        """From the mount's root, without a leading slash; readable whatever the bytes are."""
        parts: list[str] = []
        node: Node = self
        while node.links:
            directory, name = node.links[0]
            parts.append(name.decode(errors="backslashreplace"))
            node = directory
        return "/".join(reversed(parts))


@attrs.define(eq=False)
class Directory(Node):
    """Names and what they lead to."""

    entries: dict[bytes, Node] = attrs.field(factory=dict)

    @property
    def nlink(self) -> int:
        """2 and one for each directory inside, as most filesystems count; 0 once removed."""
        if not self.links and self.ino != ROOT_INO:
            return 0
        return 2 + sum(isinstance(node, Directory) for node in self.entries.values())


@attrs.define(eq=False)
class RegionFile(Node):
    """A region with the file that holds its memory."""

    region: Region = attrs.field(kw_only=True)
    backing: Backing = attrs.field(kw_only=True)
    native: bool = attrs.field(default=False, kw_only=True)
    """Somebody has been let write past us (``Semantics.native``)."""
    written_ns: int = attrs.field(default=0, kw_only=True)
    """The backing file's time of change, as of when we last looked at it for that."""

    @property
    def size(self) -> int:
        return self.region.size


@attrs.define(eq=False)
class Special(Node):
    """What is neither directory nor region: a symbolic link, a pipe or a socket.

    The kernel does all that can be done with one, given the type in ``mode`` and the ``target``.
    """

    target: bytes = b""

    @property
    def size(self) -> int:
        return len(self.target)


class Namespace:
    """All nodes of one mount. ``semantics`` are those of its regions."""

    def __init__(
        self,
        *,
        root_mode: int,
        uid: int,
        gid: int,
        new_backing: Callable[[str], Backing],
        dropped: Callable[[RegionFile], None],
        semantics: Semantics = MSHARE,
    ) -> None:
        """``dropped`` is told of a region that has gone, and disposes of what belongs to it."""
        self.root = Directory(ROOT_INO, stat.S_IFDIR | root_mode, uid, gid)
        self._nodes: dict[int, Node] = {ROOT_INO: self.root}
        self._next_ino = FIRST_INO
        self._new_backing = new_backing
        self._dropped = dropped
        self._semantics = semantics

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def semantics(self) -> Semantics:
        """Those of every region."""
        return self._semantics

    def find(self, ino: int) -> Node | None:
        """The node of that number, if there is one."""
        return self._nodes.get(ino)

    def node(self, ino: int) -> Node:
        """Raises NoSuchName if there is no such node (any more)."""
        found = self._nodes.get(ino)
        if found is None:
            raise NoSuchName(f"no node {ino}")
        return found

    def directory(self, ino: int) -> Directory:
        found = self.node(ino)
        if not isinstance(found, Directory):
            raise NotADirectory(found.path)
        return found

    def region_file(self, ino: int) -> RegionFile:
        found = self.node(ino)
        if not isinstance(found, RegionFile):
            raise IsADirectory(found.path)
        return found

    def find_region(self, ino: int) -> RegionFile | None:
        """The region of that inode number, if it is one."""
        found = self._nodes.get(ino)
        return found if isinstance(found, RegionFile) else None

    def regions(self) -> Iterator[RegionFile]:
        return (node for node in self._nodes.values() if isinstance(node, RegionFile))

    @staticmethod
    def lookup(directory: Directory, name: bytes) -> Node:
        found = directory.entries.get(name)
        if found is None:
            raise NoSuchName(os.fsdecode(name))
        return found

    # -- making and removing names

    def create_region(
        self, directory: Directory, name: bytes, mode: int, uid: int, gid: int
    ) -> RegionFile:
        """A new, unsized region. ``mode`` is taken as the kernel has masked it."""
        self._check_new_name(directory, name)
        ino = self.new_ino()
        label = name.decode(errors="backslashreplace")
        made = RegionFile(
            ino,
            stat.S_IFREG | stat.S_IMODE(mode),
            uid,
            _inherited_gid(directory, gid),
            region=Region(ino, label, self._semantics),
            backing=self._new_backing(label),
        )
        self._add(directory, name, made)
        return made

    def make_special(
        self,
        directory: Directory,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        target: bytes = b"",
    ) -> Special:
        """A symbolic link to ``target``, a pipe or a socket: ``mode`` says which.

        Raises Reserved on a mount that holds only regions and directories, and for devices.
        """
        if not self._semantics.any_names or stat.S_IFMT(mode) not in _SPECIAL_TYPES:
            raise Reserved("only regions and directories live here")
        self._check_new_name(directory, name)
        gid = _inherited_gid(directory, gid)
        made = Special(self.new_ino(), mode, uid, gid, target=target)
        self._add(directory, name, made)
        return made

    def make_directory(
        self, directory: Directory, name: bytes, mode: int, uid: int, gid: int
    ) -> Directory:
        self._check_new_name(directory, name)
        mode = stat.S_IMODE(mode)
        if directory.mode & stat.S_ISGID:
            mode |= stat.S_ISGID
        made = Directory(self.new_ino(), stat.S_IFDIR | mode, uid, _inherited_gid(directory, gid))
        self._add(directory, name, made)
        return made

    def link(self, node: Node, directory: Directory, name: bytes) -> None:
        """One more name for anything but a directory."""
        if isinstance(node, Directory):
            raise Reserved("a directory has one name")
        self._check_new_name(directory, name)
        node.touch(content=False)
        self._attach(directory, name, node)
        self._renamed(node)

    def unlink(self, directory: Directory, name: bytes) -> RegionFile | Special:
        """Take a name away (unlink(2)); :meth:`drop_if_dead` is the caller's to call."""
        self._check_reserved(directory, name)
        node = self.lookup(directory, name)
        if not isinstance(node, RegionFile | Special):
            raise IsADirectory(node.path)
        self._detach(directory, name, node)
        return node

    def remove_directory(self, directory: Directory, name: bytes) -> Directory:
        self._check_reserved(directory, name)
        node = self.lookup(directory, name)
        if not isinstance(node, Directory):
            raise NotADirectory(node.path)
        if node.entries:
            raise NotEmpty(node.path)
        self._detach(directory, name, node)
        return node

    def rename(
        self,
        old_directory: Directory,
        old_name: bytes,
        new_directory: Directory,
        new_name: bytes,
        flags: int = 0,
    ) -> tuple[Node, Node | None]:
        """As renameat2(2) with its two portable flags.

        Returns the node that moved and the one whose name it took, if any, for which the caller
        calls :meth:`drop_if_dead`.
        """
        if flags not in {0, RENAME_NOREPLACE, RENAME_EXCHANGE}:
            raise BadRename(f"flags {flags:#x}")
        self._check_reserved(old_directory, old_name)
        self._check_reserved(new_directory, new_name)
        self._check_length(new_name)
        moved = self.lookup(old_directory, old_name)
        target = new_directory.entries.get(new_name)
        if target is None and flags == RENAME_EXCHANGE:
            raise NoSuchName(os.fsdecode(new_name))
        if target is not None and flags == RENAME_NOREPLACE:
            raise NameTaken(target.path)
        self._check_no_loop(moved, new_directory)
        if target is moved:
            return moved, None
        if flags == RENAME_EXCHANGE and target is not None:
            self._check_no_loop(target, old_directory)
            self._swap(old_directory, old_name, new_directory, new_name)
            return moved, None
        if target is not None:
            self._check_replaceable(moved, target)
            self._detach(new_directory, new_name, target)
        self._detach(old_directory, old_name, moved)
        self._attach(new_directory, new_name, moved)
        self._renamed(moved)
        return moved, target

    def _swap(
        self,
        one_directory: Directory,
        one_name: bytes,
        other_directory: Directory,
        other_name: bytes,
    ) -> None:
        one, other = one_directory.entries[one_name], other_directory.entries[other_name]
        one_directory.entries[one_name] = other
        other_directory.entries[other_name] = one
        one.links[one.links.index((one_directory, one_name))] = (other_directory, other_name)
        other.links[other.links.index((other_directory, other_name))] = (one_directory, one_name)
        for node in (one, other):
            node.touch(content=False)
            self._renamed(node)
        one_directory.touch()
        other_directory.touch()

    # -- references

    def forget(self, ino: int, lookups: int) -> None:
        """The kernel lets go of ``lookups`` references (FUSE_FORGET)."""
        node = self._nodes.get(ino)
        if node is not None:
            node.lookups = max(0, node.lookups - lookups)
            self.drop_if_dead(node)

    def drop_if_dead(self, node: Node) -> None:
        """To be called whenever a name, descriptor or reference of ``node`` has gone."""
        if node.alive or node is self.root or self._nodes.pop(node.ino, None) is None:
            return
        if isinstance(node, RegionFile):
            self._dropped(node)

    def leaving(self) -> bool:
        """Whether a region without name and descriptor waits for the kernel to forget it."""
        return any(not file.links and not file.opens for file in self.regions())

    def clear(self) -> None:
        """The mount has gone, and with it every reference."""
        for region in list(self.regions()):
            del self._nodes[region.ino]
            self._dropped(region)
        self._nodes = {ROOT_INO: self.root}

    # -- helpers

    def new_ino(self) -> int:
        """An inode number that no node had or will have."""
        ino = self._next_ino
        self._next_ino += INO_STEP
        return ino

    def _add(self, directory: Directory, name: bytes, node: Node) -> None:
        self._nodes[node.ino] = node
        self._attach(directory, name, node)
        self._renamed(node)

    @staticmethod
    def _attach(directory: Directory, name: bytes, node: Node) -> None:
        directory.entries[name] = node
        node.links.append((directory, name))
        directory.touch()

    def _detach(self, directory: Directory, name: bytes, node: Node) -> None:
        del directory.entries[name]
        node.links.remove((directory, name))
        directory.touch()
        node.touch(content=False)
        self._renamed(node)

    def _renamed(self, node: Node) -> None:
        """Keep ``Region.name`` what the events call it; an unlinked region keeps its last name."""
        if isinstance(node, RegionFile):
            if node.links:
                node.region.name = node.path
        elif isinstance(node, Directory):
            for child in node.entries.values():
                self._renamed(child)

    def _check_new_name(self, directory: Directory, name: bytes) -> None:
        self._check_reserved(directory, name)
        self._check_length(name)
        if name in directory.entries:
            raise NameTaken(os.fsdecode(name))
        if directory is not self.root and not directory.links:
            raise NoSuchName("the directory has been removed")

    def _check_reserved(self, directory: Directory, name: bytes) -> None:
        if directory is self.root and name in RESERVED_NAMES:
            raise Reserved(f"{os.fsdecode(name)} belongs to the mount")

    @staticmethod
    def _check_length(name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise NameTooLong(f"{len(name)} bytes")

    @staticmethod
    def _check_no_loop(moved: Node, destination: Directory) -> None:
        at: Node | None = destination
        while at is not None:
            if at is moved:
                raise BadRename("a directory cannot move into itself")
            at = at.links[0][0] if at.links else None

    @staticmethod
    def _check_replaceable(moved: Node, target: Node) -> None:
        if isinstance(target, Directory):
            if not isinstance(moved, Directory):
                raise IsADirectory(target.path)
            if target.entries:
                raise NotEmpty(target.path)
        elif isinstance(moved, Directory):
            raise NotADirectory(target.path)


def _inherited_gid(directory: Directory, gid: int) -> int:
    """mkdir(2), open(2): in a set-group-ID directory the group is the directory's."""
    return directory.gid if directory.mode & stat.S_ISGID else gid
