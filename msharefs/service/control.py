"""The ``.control`` tree and ``mshare_info``: files that the mount makes up.

    mshare_info                     the alignment of region sizes, as in the kernel series
    .control/events                 every region's events
    .control/PATH/events            that region's events
    .control/PATH/maps              its mappings, in the manner of /proc/PID/maps
    .control/PATH/clients           the processes that map it
    .control/PATH/stats             counters, key value

``PATH`` mirrors the namespace: a directory has a directory, a region has one with its files.
Nothing here is stored: a control node is the number of the node it belongs to plus a slot (see
:class:`Slot`), so it exists exactly as long as that node does, and nobody can remove or rename
it. Modes follow the region's: whoever may read a region may see what is in it, and whoever may
write it may write ``allow SEQ`` or ``deny SEQ`` to its events file. The mount's own event stream
shows every user's regions and is for the mount's owner alone.
"""

from __future__ import annotations

import stat
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.abi import Kind, MapFlag
from msharefs.service.errors import NoSuchName, NotADirectory
from msharefs.service.nodes import (
    CONTROL_EVENTS_INO,
    CONTROL_INO,
    CONTROL_NAME,
    FIRST_INO,
    INFO_INO,
    INFO_NAME,
    INO_STEP,
    ROOT_INO,
    Directory,
    Namespace,
    Node,
    RegionFile,
    Special,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from msharefs.clients.census import MappedRange
    from msharefs.memory.objects import FileObject, Objects
    from msharefs.region.mapping import Mapping
    from msharefs.service.changes import RegionState

MAPS_PER_PIECE: Final = 256


class Slot(IntEnum):
    """What a control node is, as the low bits of its inode number."""

    NODE = 0
    DIRECTORY = 1
    EVENTS = 2
    MAPS = 3
    CLIENTS = 4
    STATS = 5


_FILES: Final = {
    b"events": Slot.EVENTS,
    b"maps": Slot.MAPS,
    b"clients": Slot.CLIENTS,
    b"stats": Slot.STATS,
}


@attrs.frozen
class ControlNode:
    """A made-up node: ``slot`` of ``owner``; the root's directory and events have fixed numbers."""

    ino: int
    slot: Slot
    owner: Node

    @property
    def is_directory(self) -> bool:
        return self.slot is Slot.DIRECTORY

    @property
    def mode(self) -> int:
        """Type and permission bits, derived from the owner's."""
        permissions = stat.S_IMODE(self.owner.mode)
        if self.ino == INFO_INO:
            return stat.S_IFREG | 0o444
        if self.ino == CONTROL_EVENTS_INO:
            return stat.S_IFREG | 0o600
        if self.ino == CONTROL_INO:
            return stat.S_IFDIR | 0o555
        if isinstance(self.owner, Directory):
            return stat.S_IFDIR | (permissions & 0o555)
        readable = permissions & 0o444
        if self.is_directory:
            return stat.S_IFDIR | readable | readable >> 2
        if self.slot is Slot.EVENTS:
            readable |= permissions & 0o222
        return stat.S_IFREG | readable


class ControlTree:
    """Finds control nodes and lists them."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        root = namespace.root
        self._fixed = {
            INFO_INO: ControlNode(INFO_INO, Slot.NODE, root),
            CONTROL_INO: ControlNode(CONTROL_INO, Slot.DIRECTORY, root),
            CONTROL_EVENTS_INO: ControlNode(CONTROL_EVENTS_INO, Slot.EVENTS, root),
        }

    def node(self, ino: int) -> ControlNode | None:
        """The control node of that number; None if the number is not of that kind.

        Raises NoSuchName if what it belongs to has gone.
        """
        fixed = self._fixed.get(ino)
        if fixed is not None:
            return fixed
        slot = ino % INO_STEP
        if ino < FIRST_INO or slot == Slot.NODE:
            return None
        return self._of(self._namespace.node(ino - slot), Slot(slot))

    def in_root(self, name: bytes) -> ControlNode | None:
        """``mshare_info`` and ``.control``, which the root directory shows beside its own."""
        if name == INFO_NAME:
            return self._fixed[INFO_INO]
        return self._fixed[CONTROL_INO] if name == CONTROL_NAME else None

    @staticmethod
    def parent_ino(node: ControlNode) -> int:
        """The number of the control directory above a control directory."""
        if node.ino == CONTROL_INO or not node.owner.links:
            return ROOT_INO
        above = node.owner.links[0][0].ino
        return CONTROL_INO if above == ROOT_INO else above + Slot.DIRECTORY

    def lookup(self, parent: ControlNode, name: bytes) -> ControlNode:
        for child_name, child in self.children(parent):
            if child_name == name:
                return child
        raise NoSuchName(name.decode(errors="backslashreplace"))

    def children(self, parent: ControlNode) -> Iterator[tuple[bytes, ControlNode]]:
        """Raises NotADirectory."""
        if not parent.is_directory:
            raise NotADirectory("a control file")
        owner = parent.owner
        if owner.ino == ROOT_INO:
            yield b"events", self._fixed[CONTROL_EVENTS_INO]
        if isinstance(owner, Directory):
            for name, node in owner.entries.items():
                if not isinstance(node, Special):
                    yield name, self._of(node, Slot.DIRECTORY)
        else:
            for name, slot in _FILES.items():
                yield name, self._of(owner, slot)

    @staticmethod
    def _of(owner: Node, slot: Slot) -> ControlNode:
        if isinstance(owner, Directory) and slot is not Slot.DIRECTORY:
            raise NoSuchName("a directory has no control files")
        if isinstance(owner, Special):
            raise NoSuchName("only regions and directories have control files")
        return ControlNode(owner.ino + slot, slot, owner)


# -- texts


def info_text(alignment: int) -> Iterator[bytes]:
    """As the kernel series prints it: the number and a newline."""
    yield b"%d\n" % alignment


def maps_text(mappings: tuple[Mapping, ...], objects: Objects) -> Iterator[bytes]:
    r"""``START-END PROT OBJECT_OFFSET DEVICE INODE KIND PATH``, as /proc/PID/maps writes them.

    KIND is ``anon``, ``huge`` for memory that asks for huge pages, ``file``, or ``shmem`` for a file
    that is memory itself. PATH, of files only,
    is the server's; in it a newline is written ``\012``, and a backslash ``\134``. The files are
    looked at now, the text is made later.
    """
    shown: dict[int, bytes] = {}
    for mapping in mappings if len(objects) else ():
        ident = mapping.object.ident
        if mapping.object.kind is Kind.FILE and ident not in shown:
            shown[ident] = _object_words(objects.of(ident))
    return _maps_pieces(mappings, shown)


def _object_words(shown: FileObject) -> bytes:
    return (b"shmem " if shown.shmem else b"file ") + _escaped(shown.path_now)


def _maps_pieces(mappings: tuple[Mapping, ...], shown: dict[int, bytes]) -> Iterator[bytes]:
    for first in range(0, len(mappings), MAPS_PER_PIECE):
        piece = mappings[first : first + MAPS_PER_PIECE]
        yield b"".join(
            _maps_line(m) + shown.get(m.object.ident, _memory_word(m)) + b"\n" for m in piece
        )


def _memory_word(mapping: Mapping) -> bytes:
    return b"huge" if mapping.flags & MapFlag.HUGETLB else b"anon"


def _maps_line(mapping: Mapping) -> bytes:
    obj = mapping.object
    sharing = "s" if mapping.flags & MapFlag.SHARED else "p"
    return (
        f"{mapping.start:012x}-{mapping.end:012x} {mapping.prot.text()}{sharing}"
        f" {mapping.object_offset:08x} {obj.dev_major:02x}:{obj.dev_minor:02x} {obj.ino} "
    ).encode()


@attrs.frozen
class Standing:
    """How a process that maps a region stands to its table.

    ``state``: ``replica`` (its mapping is what the table says), ``fault`` (parts of it are enforced
    by faults), or ``unenforced``, and then ``why``. ``armed``: how many ranges are caught in it;
    ``faults``: how many accesses have been.
    """

    state: str = "unenforced"
    why: str = "the mount has no gate"
    armed: int = 0
    faults: int = 0


def clients_text(
    found: Iterable[MappedRange], standing: Callable[[int], Standing | None]
) -> Iterator[bytes]:
    r"""``PID START-END PROT OFFSET STATE ARMED FAULTS COMM``, a line for each mapping of the region.

    Numbers as in /proc/PID/maps. STATE of an unenforced process is ``unenforced:WHY``. In WHY and
    COMM a newline is written ``\012`` and a backslash ``\134``, in WHY a space ``\040``, as in
    proc_pid_mounts(5). ``standing`` tells of a process, None if nothing is known of it.
    """
    for mapped in sorted(found, key=lambda m: (m.pid, m.start)):
        sharing = "s" if mapped.shared else "p"
        known = standing(mapped.pid) or Standing(why="not found yet")
        why = _escaped(known.why.encode()).decode().replace(" ", "\\040")
        state = f"{known.state}:{why}" if known.state == "unenforced" and why else known.state
        yield (
            (
                f"{mapped.pid} {mapped.start:012x}-{mapped.end:012x} {mapped.prot.text()}{sharing}"
                f" {mapped.offset:08x} {state} {known.armed} {known.faults} "
            ).encode()
            + _escaped(command_name(mapped.pid))
            + b"\n"
        )


def command_name(pid: int) -> bytes:
    """/proc/PID/comm, which may be anything that a process likes; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().removesuffix(b"\n")
    except OSError:
        return b""


def _escaped(text: bytes) -> bytes:
    """Without what would end a line, or pass for such."""
    return text.replace(b"\\", rb"\134").replace(b"\n", rb"\012")


def stats_text(file: RegionFile, state: RegionState) -> Iterator[bytes]:
    """``key value`` lines: sizes in bytes, then how often what happened since the mount began."""
    region = file.region
    sizes = {
        "size": region.size,
        "mapped": region.table.mapped,
        "allocated": file.backing.allocated,
        "mappings": len(region.table),
        "descriptors": region.descriptors,
    }
    changes = ("open", "map", "unmap", "protect", "resize", "refuse")
    watched = ("notify", "fault", "deny", "hold", "release")
    reads = ("read", "read_bytes", "write", "write_bytes")
    counts = {name: state.counters.get(name, 0) for name in changes + reads + watched}
    yield "".join(f"{key} {value}\n" for key, value in {**sizes, **counts}.items()).encode()
