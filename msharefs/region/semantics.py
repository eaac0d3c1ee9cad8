"""What a mount takes its files for: the rules that differ from one kind of mount to another.

One value of :class:`Semantics` is chosen by the mount options and held by every region of the
mount. Code asks it for the rule at hand, never for the kind of mount, so that a further kind is
one more value here.

Leaves out: what a rule means for memory and for the programs that map a region. Whoever carries a
change out finds that in the change.
"""

from __future__ import annotations

from typing import Final

import attrs

from msharefs.abi import PAGE_SIZE, PROT_ALL, Command, Prot


@attrs.frozen
class Semantics:
    """The rules of one kind of mount.

    ``grown``: the protection of the memory that growing a file maps over the new part. NONE maps
    nothing: the part is a hole until CREATE_MAPPING fills it, and write() does not grow the file.
    ``superset``: an open() or mmap() that does not give every right that the region holds
    somewhere is refused, and so is a change that gives one which a live descriptor or mapping
    lacks. Without it each descriptor and mapping has its own rights at most, as for plain files:
    what a mapping may do is what it was made for *and* what the table says.
    ``beyond``: what a mapping may do past the region's end, before the kernel's SIGBUS.
    ``reserves``: memory is counted against the mount's limit when it is mapped; else when it is
    touched, and a program that touches more than there is gets SIGBUS.
    ``allocates``: fallocate() with mode 0 gives memory to the range; else it only sets the size.
    ``any_names``: symbolic links, pipes and sockets may lie between the regions.
    ``native``: read() and write() through a descriptor go straight to the memory, if nothing lay
    over the file when it was opened. They obey no table from then on.
    ``private``: MAP_PRIVATE is let in. Such a mapping is a copy that nothing here can reach.
    ``alignment``: in bytes, what the mount tells its users to make sizes a multiple of.
    ``sized_once``: it must be one, and is set once, before anything else is done with the region.
    ``contents``: read() and write() reach what lies in the region.
    ``changed_by_readers``: a descriptor need not be open for writing to change the table.
    ``as_mmap``: CREATE_MAPPING and UNMAP take their arguments as mmap(2) and munmap(2) do, which
    round a size up to whole pages and pass over flags and protections that they do not know. Else
    such are refused.
    ``whole``: mmap() takes all of a region, at a multiple of ``alignment`` (``region/window.py``).
    ``limited``: a mapping may do no more than it was made for, by mmap()'s protection. Else it may
    do what the table says, as far as its descriptor's access mode allows, whatever it was made for.
    ``commands``: the ioctls that a region has.
    ``by_mknod``: mknod(2) makes regions, as open(2) does.
    ``no_huge``: why CREATE_MAPPING with MAP_HUGETLB is refused, and what would help; empty where
    the mount can ask for huge pages, or has them anyway.
    """

    grown: Prot = Prot.NONE
    superset: bool = True
    beyond: Prot = Prot.NONE
    reserves: bool = True
    allocates: bool = False
    any_names: bool = False
    native: bool = False
    private: bool = False
    alignment: int = PAGE_SIZE
    sized_once: bool = False
    contents: bool = True
    changed_by_readers: bool = False
    as_mmap: bool = False
    whole: bool = False
    limited: bool = True
    commands: frozenset[Command] = frozenset(Command)
    by_mknod: bool = True
    no_huge: str = "the mount has no huge pages of its own: mount with -o huge=advise"


MSHARE: Final = Semantics()
"""As the rules table in ``docs/ioctl.md`` has them."""

AUTOMAP: Final = Semantics(
    grown=Prot.READ | Prot.WRITE,
    superset=False,
    beyond=PROT_ALL,
    reserves=False,
    allocates=True,
    any_names=True,
)
"""As tmpfs(5), for programs that know nothing of mshare: ``docs/automap.md``."""

V3: Final = Semantics(
    superset=False,
    alignment=1 << 39,
    sized_once=True,
    contents=False,
    changed_by_readers=True,
    as_mmap=True,
    whole=True,
    limited=False,
    commands=frozenset({Command.CREATE_MAPPING, Command.UNMAP, Command.INFO}),
    by_mknod=False,
)
"""As the third version of the kernel series, of August 2025: ``docs/kernel-v3.md``.

512 GiB is what one page of the topmost page table but one maps on x86-64 (P4D_SIZE).
"""
