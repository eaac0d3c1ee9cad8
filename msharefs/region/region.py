"""A region: its size, its table, and the rules that hold for both.

For: deciding whether an open, a change or an access is allowed, and what exactly a change does.
Every rule of the rules table that can be judged without asking the kernel is judged here; the
source of each is mmap(2), munmap(2), mprotect(2), or the rules table in ``docs/ioctl.md``.

Promises: pure and synchronous. ``plan_*`` changes nothing and raises
:class:`~msharefs.region.errors.RegionError`; ``apply`` carries a plan out; applying
``change.inverse()`` right after undoes it.

Leaves out: memory, processes, who is asking.
"""

from __future__ import annotations

from typing import Final

import attrs

from msharefs.abi import MAP_TYPE, PROT_ALL, Kind, MapFlag, Prot
from msharefs.region.errors import (
    AccessDenied,
    AccessHole,
    BadArgument,
    DescriptorReadOnly,
    ModeTooNarrow,
    NotSized,
    RightsInUse,
    Unsupported,
)
from msharefs.region.mapping import ANON, PROTS, Change, Mapping, ObjectRef, RangeChange
from msharefs.region.pages import checked_end, page_up
from msharefs.region.semantics import MSHARE, Semantics
from msharefs.region.table import MappingTable

KNOWN_FLAGS: Final = int(
    MapFlag.SHARED_VALIDATE
    | MapFlag.FIXED
    | MapFlag.ANONYMOUS
    | MapFlag.NORESERVE
    | MapFlag.HUGETLB
    | MapFlag.FIXED_NOREPLACE
)

# Plain numbers: `&` of a number with an IntFlag takes a microsecond and is done on every call.
_SHARING: Final = frozenset({int(MapFlag.SHARED), int(MapFlag.SHARED_VALIDATE)})
_SHARED: Final = int(MapFlag.SHARED)
_FIXED: Final = int(MapFlag.FIXED)
_FIXED_NOREPLACE: Final = int(MapFlag.FIXED_NOREPLACE)
_ANONYMOUS: Final = int(MapFlag.ANONYMOUS)
_NO_PROT: Final = ~int(PROT_ALL)
_WRITE: Final = int(Prot.WRITE)
_SHARED_VALIDATE: Final = int(MapFlag.SHARED_VALIDATE)
_HUGETLB: Final = int(MapFlag.HUGETLB)
_HUGE_SHIFT: Final = 26
_HUGE_MASK: Final = 0x3F
_HUGE_DEFAULT: Final = 21
_HUGE_ORDERS: Final = frozenset({0, 21, 30})
"""2 MiB, which is also the default, and 1 GiB: those of x86-64 (mmap(2), MAP_HUGE_2MB)."""
_LEGACY: Final = 0x1F900
"""GROWSDOWN, DENYWRITE, EXECUTABLE, LOCKED, POPULATE, NONBLOCK and STACK, which mmap(2) always
knows and which mean nothing in a region."""

READ_ONLY: Final = Prot.READ | Prot.EXEC
WRITE_ONLY: Final = Prot.WRITE
READ_WRITE: Final = PROT_ALL
"""What a descriptor's access mode can give. Executing needs a readable descriptor, as in mmap(2)."""


@attrs.frozen
class Resize:
    """A planned change of a region's size in bytes.

    Shrinking unmaps what lies past the end; growing maps what ``Semantics.grown`` says.
    """

    old_size: int
    new_size: int
    change: Change


@attrs.define(eq=False)
class Region:
    """One region. ``number`` identifies it for as long as the mount lives; ``name`` is its path."""

    number: int
    name: str
    semantics: Semantics = MSHARE
    size: int = 0
    sized: bool = False
    table: MappingTable = attrs.field(factory=MappingTable)
    _descriptors: dict[Prot, int] = attrs.field(factory=dict)
    _pending: Prot = Prot.NONE
    _changing: tuple[RangeChange, ...] = ()

    @property
    def limit(self) -> int:
        """The end of the last page, in bytes: ranges must not reach past it."""
        return page_up(self.size)

    @property
    def rights(self) -> Prot:
        """The union of the protections inside, counting a change that is under way."""
        return PROTS[int(self.table.rights) | int(self._pending)]

    @property
    def plain(self) -> bool:
        """Whether all of it is as growing has made it: nothing was laid over it, or taken out."""
        grown = self.semantics.grown
        if not self.limit:
            return True
        whole = len(self.table) == 1 and self.table.mapped == self.limit
        other = self.table.files or self.table.huge
        return whole and not other and self.rights == grown

    @property
    def lets_private(self) -> bool:
        """Whether MAP_PRIVATE is let be: it is a copy of memory, also where a file lies."""
        return self.semantics.private and not self.table.files

    @property
    def descriptors(self) -> int:
        """How many descriptors are open."""
        return sum(self._descriptors.values())

    # -- descriptors

    def check_open(self, access: Prot) -> None:
        """The superset rule, where it holds. Raises ModeTooNarrow."""
        lacking = int(self.rights) & ~int(access)
        if lacking and self.semantics.superset:
            raise ModeTooNarrow(
                f"the region holds {self.rights.text()} mappings;"
                f" the access mode does not cover {PROTS[lacking].text()}"
            )

    def check_mmap(self, prot: Prot) -> None:
        """The same rule for mmap(): ``prot`` is what the mapping allows. Raises ModeTooNarrow."""
        lacking = int(self.rights) & ~int(prot)
        if lacking and self.semantics.superset:
            raise ModeTooNarrow(
                f"the region holds {self.rights.text()} mappings;"
                f" mmap() with {prot.text()} does not cover {PROTS[lacking].text()}"
            )

    def opened(self, access: Prot) -> None:
        """Count a descriptor. Raises as :meth:`check_open` does."""
        self.check_open(access)
        self._descriptors[access] = self._descriptors.get(access, 0) + 1

    def closed(self, access: Prot) -> None:
        """The reverse of :meth:`opened`."""
        left = self._descriptors[access] - 1
        if left:
            self._descriptors[access] = left
        else:
            del self._descriptors[access]

    def check_may_change(self, access: Prot) -> None:
        """Whoever may open a region for writing may change its table; others may not."""
        if not int(access) & _WRITE and not self.semantics.changed_by_readers:
            raise DescriptorReadOnly("the descriptor is not open for writing")

    def contested(self, change: Change) -> Prot:
        """The rights a change newly gives that every live descriptor and mapping must have."""
        return change.gained if self.semantics.superset else Prot.NONE

    def check_descriptors(self, change: Change) -> None:
        """Raises RightsInUse if the change adds a right that an open descriptor lacks."""
        gained = int(self.contested(change))
        if not gained:
            return
        for access, count in self._descriptors.items():
            lacking = gained & ~int(access)
            if lacking:
                raise RightsInUse(
                    f"{count} open descriptor(s) lack {PROTS[lacking].text()},"
                    " which the region would newly give"
                )

    def begin(self, change: Change) -> None:
        """Count the rights a change will give, so that an open() meanwhile is held to them.

        And those that it takes: :meth:`rights_at` does not give them any more.
        """
        self._pending = change.rights_after
        self._changing = change.ranges

    def end(self) -> None:
        """The change is through, or given up."""
        self._pending = Prot.NONE
        self._changing = ()

    def rights_at(self, offset: int) -> Prot:
        """What an access to ``offset`` may do this moment; NONE in a hole.

        While a change is under way: what the old and the new table both give.
        """
        mapping = self.table.at(offset)
        if mapping is None:
            return Prot.NONE
        for part in self._changing:
            if part.start <= offset < part.end:
                given = 0 if part.new is None else int(part.new.prot)
                return PROTS[int(mapping.prot) & given]
        return mapping.prot

    # -- planning

    def plan_map(
        self,
        offset: int,
        size: int,
        prot: int,
        flags: int,
        *,
        obj: ObjectRef = ANON,
        object_offset: int = 0,
        max_prot: Prot = PROT_ALL,
    ) -> Change:
        """CREATE_MAPPING. Bytes; flags and prot with mmap(2)'s values, checked here."""
        end = self.check_map(offset, size, prot, flags)
        prot &= PROT_ALL
        if obj.kind is Kind.ANON:
            object_offset = 0
        kept = _SHARED | flags & (_ANONYMOUS | _HUGETLB)
        mapping = Mapping(offset, end, PROTS[prot], obj, object_offset, max_prot, kept)
        return self.table.plan_map(mapping, replace=not flags & _FIXED_NOREPLACE)

    def check_map(self, offset: int, size: int, prot: int, flags: int) -> int:
        """The checks of CREATE_MAPPING that need no object. Returns the range's end."""
        if self.semantics.as_mmap:
            size = _huge_size(offset, size, flags)
        end = self._change_end(offset, size)
        if flags & MAP_TYPE not in _SHARING:
            raise BadArgument("only MAP_SHARED objects may lie in a region")
        if not flags & _FIXED:
            raise BadArgument("MAP_FIXED is required: the region does not choose offsets")
        if self.semantics.as_mmap:
            _check_validated(flags)
            return end
        unknown = flags & ~KNOWN_FLAGS
        if unknown:
            raise BadArgument(f"flags {unknown:#x} have no meaning in a region")
        _check_prot(prot)
        if flags & _HUGETLB:
            self._check_huge(flags)
        return end

    def _check_huge(self, flags: int) -> None:
        if not flags & _ANONYMOUS:
            raise BadArgument("MAP_HUGETLB is for memory: a file has the pages that it has")
        if self.semantics.no_huge:
            raise Unsupported(f"MAP_HUGETLB: {self.semantics.no_huge}")

    def plan_unmap(self, offset: int, size: int) -> Change:
        """UNMAP."""
        return self.table.plan_unmap(offset, self._change_end(offset, size))

    def plan_protect(self, offset: int, size: int, prot: int, flags: int = 0) -> Change:
        """PROTECT."""
        end = self.check_range(offset, size)
        if flags:
            raise BadArgument(f"flags {flags:#x}: must be zero")
        _check_prot(prot)
        return self.table.plan_protect(offset, end, PROTS[prot])

    def plan_resize(self, size: int) -> Resize:
        """ftruncate() and fallocate(). Any size, any number of times, but for ``Semantics``."""
        if size < 0:
            raise BadArgument(f"size {size} is negative")
        if self.semantics.sized_once:
            if self.sized:
                raise BadArgument(f"the size is set, to {self.size}, and stays")
            if size % self.semantics.alignment:
                raise BadArgument(f"size {size} is not a multiple of {self.semantics.alignment}")
        old_limit, new_limit = self.limit, page_up(size)
        if new_limit > old_limit and self.semantics.grown:
            grown = Mapping(old_limit, new_limit, self.semantics.grown)
            change = self.table.plan_map(grown)
        else:
            change = self.table.plan_unmap(min(new_limit, old_limit), old_limit)
        return Resize(self.size, size, change)

    def apply(self, change: Change) -> None:
        self.table.apply(change)

    def apply_resize(self, resize: Resize) -> None:
        self.table.apply(resize.change)
        self.size = resize.new_size
        self.sized = True

    # -- looking

    def check_sized(self) -> None:
        """Raises NotSized before the first ftruncate() or fallocate()."""
        if not self.sized:
            raise NotSized("the region has no size yet: ftruncate() or fallocate() it first")

    def check_range(self, offset: int, size: int) -> int:
        """The range's end. Raises NotSized or BadRange."""
        self.check_sized()
        return checked_end(offset, size, self.limit)

    def _change_end(self, offset: int, size: int) -> int:
        """As :meth:`check_range`, for the two calls that have a namesake among system calls."""
        if self.semantics.as_mmap and 0 < size <= self.limit:
            size = page_up(size)
        return self.check_range(offset, size)

    def query(self, offset: int, *, or_next: bool = False) -> Mapping:
        """QUERY: the mapping that covers ``offset`` or, with ``or_next``, the next one."""
        self.check_sized()
        return self.table.query(offset, or_next=or_next)

    # -- read() and write()

    def readable(self, offset: int, size: int) -> int:
        """How many bytes from ``offset`` read() may take: 0 at the end of the region.

        A count short of ``size`` where a hole or an unreadable mapping begins; raises AccessHole
        or AccessDenied if it begins at ``offset``.
        """
        return self._accessible(offset, min(size, self.size - offset), Prot.READ)

    def writable(self, offset: int, size: int) -> int:
        """As :meth:`readable` for write().

        Past the end lies nothing, so AccessHole there; but where files grow by being written to
        (``Semantics.grown``) any count is fine past the last page.
        """
        if self.semantics.grown:
            inside = min(size, max(self.limit - offset, 0))
            taken = self._accessible(offset, inside, Prot.WRITE)
            return size if taken == inside else taken
        if size and offset >= self.size:
            raise AccessHole(f"{offset:#x} is past the region's end at {self.size:#x}")
        return self._accessible(offset, min(size, self.size - offset), Prot.WRITE)

    def check_writable(self, offset: int, size: int) -> None:
        """Raises as write() at the first byte of the range that it would not write."""
        end = offset + size
        while offset < end:
            offset += self.writable(offset, end - offset)

    def _accessible(self, offset: int, size: int, right: Prot) -> int:
        at, end, wanted = offset, offset + max(size, 0), int(right)
        while at < end:
            mapping = self.table.at(at)
            if mapping is None:
                if at == offset:
                    raise AccessHole(f"nothing is mapped at {at:#x}")
                break
            if not int(mapping.prot) & wanted:
                if at == offset:
                    raise AccessDenied(
                        f"the mapping at {at:#x} is {mapping.prot.text()},"
                        f" the access needs {right.text()}"
                    )
                break
            at = mapping.end
        return min(at, end) - offset


def _huge_size(offset: int, size: int, flags: int) -> int:
    """mmap(2), MAP_HUGETLB: memory in whole huge pages, from a multiple of one on.

    Such a range is one of ordinary memory here, by transparent huge pages where the mount has them.
    """
    if not flags & _HUGETLB:
        return size
    if not flags & _ANONYMOUS:
        raise BadArgument("MAP_HUGETLB with a file: only those of hugetlbfs have that")
    order = flags >> _HUGE_SHIFT & _HUGE_MASK
    if order not in _HUGE_ORDERS:
        raise BadArgument(f"there are no huge pages of 1 << {order} bytes")
    page = 1 << (order or _HUGE_DEFAULT)
    if offset % page:
        raise BadArgument(f"offset {offset:#x} is not a multiple of {page}, a huge page")
    return -(-size // page) * page


def _check_validated(flags: int) -> None:
    """mmap(2), MAP_SHARED_VALIDATE: files alone know it, and flags that are unknown with it."""
    if flags & MAP_TYPE != _SHARED_VALIDATE:
        return
    if flags & _ANONYMOUS:
        raise BadArgument("MAP_SHARED_VALIDATE is for files")
    unknown = flags & ~(KNOWN_FLAGS | _LEGACY)
    if unknown:
        raise Unsupported(f"flags {unknown:#x} with MAP_SHARED_VALIDATE")


def _check_prot(prot: int) -> None:
    if prot & _NO_PROT:
        raise BadArgument(f"protection {prot:#x} is not made of PROT_READ, PROT_WRITE, PROT_EXEC")
