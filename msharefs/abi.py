"""The ioctl interface of a region: numbers, struct layouts, flags. The one definition.

``include/msharefs.h`` says the same for C; a compiled test holds the two together.

Every struct has fixed-width fields in native byte order, no implicit padding, and one size on
32- and 64-bit machines. The one exception is ``mshare_create``, whose layout is the kernel
series' own (v3, ``include/uapi/linux/msharefs.h``): 40 bytes with tail padding on 64-bit, 36 on
i386, where ``u64`` is aligned to four. Both numbers are accepted.

Nothing here does I/O or decides anything: rules stand in ``region/`` and ``service/``.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from operator import attrgetter
from typing import Any, ClassVar, Final, Self, cast

import attrs

ABI_VERSION: Final = 1
"""Raised when the meaning of an existing command changes; new commands show up in features."""

PAGE_SIZE: Final = 4096
"""Bytes. The granularity of every offset and size in a region (x86-64)."""

MAGIC: Final = ord("x")
"""The ioctl type that the kernel series reserves: 'x' 00-1F in ioctl-number.rst."""

_IOC_WRITE, _IOC_READ = 1, 2


def _ioc(direction: int, number: int, size: int) -> int:
    """Encode as ``asm-generic/ioctl.h`` does: dir:2 size:14 type:8 nr:8."""
    return direction << 30 | size << 16 | MAGIC << 8 | number


class Prot(IntFlag):
    """Protection bits, with mmap(2)'s values."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXEC = 4

    def text(self) -> str:
        """``rwx`` with dashes, as in ``/proc/PID/maps``.

        >>> (Prot.READ | Prot.WRITE).text()
        'rw-'
        """
        return _PROT_TEXTS[int(self) & 7]

    @classmethod
    def parse(cls, text: str) -> Prot:
        """The reverse of :meth:`text`; also takes ``none`` and short forms such as ``r`` or ``rw``.

        Raises ValueError for anything else.
        """
        if text == "none":
            return cls.NONE
        letters = text.replace("-", "")
        bits = {"r": cls.READ, "w": cls.WRITE, "x": cls.EXEC}
        in_order = [letter for letter in "rwx" if letter in letters]
        if not text or len(text) > 3 or list(letters) != in_order:
            raise ValueError(f"not a protection: {text!r} (write it as rw-, r--, --- or none)")
        value = cls.NONE
        for letter in letters:
            value |= bits[letter]
        return value


_PROT_TEXTS: Final = ("---", "r--", "-w-", "rw-", "--x", "r-x", "-wx", "rwx")

PROT_ALL: Final = Prot.READ | Prot.WRITE | Prot.EXEC


class MapFlag(IntFlag):
    """``flags`` of CREATE_MAPPING: the mmap(2) flags that have a meaning here (x86-64 values)."""

    SHARED = 0x01
    SHARED_VALIDATE = 0x03
    FIXED = 0x10
    ANONYMOUS = 0x20
    NORESERVE = 0x4000
    HUGETLB = 0x40000
    FIXED_NOREPLACE = 0x100000


MAP_TYPE: Final = 0x0F
"""Mask of the sharing type within the flags."""


class Kind(IntEnum):
    """What a mapping holds; ``kind`` in ``mshare_query``."""

    ANON = 1
    FILE = 2


class QueryFlag(IntFlag):
    """``query_flags``: with NEXT, the mapping at or after the offset, as PROCMAP_QUERY does."""

    COVERING = 0
    NEXT = 1


class NotifyEvent(IntFlag):
    """``events`` of NOTIFY; 0 disarms."""

    DISARM = 0
    WRITE = 1
    READ = 2


class NotifyMode(IntEnum):
    """``mode`` of NOTIFY."""

    LOG = 0
    SIGNAL = 1
    HOLD = 2


class NotifyFlag(IntFlag):
    """``flags`` of NOTIFY."""

    SCAN = 1


class OnTimeout(IntEnum):
    """``on_timeout`` of NOTIFY: what becomes of a held access nobody decided on."""

    DENY = 0
    ALLOW = 1


class Gate(IntEnum):
    """``gate`` of ``mshare_info_args``: how mmap() of a region is supervised."""

    NONE = 0
    LSM = 1
    PTRACE = 2


class Feature(IntFlag):
    """``features`` of ``mshare_info_args``: what this mount can do, one bit each."""

    PROTECT = 1 << 0
    QUERY = 1 << 1
    EVENTS = 1 << 2
    ENFORCE = 1 << 3
    NOTIFY = 1 << 4
    FILE_OBJECTS = 1 << 5
    HUGE = 1 << 6


@attrs.define
class Args:
    """Base of the argument structs: packs and unpacks by ``LAYOUT``, field by field.

    Values, though not frozen: that would make unpacking one several times as slow.
    """

    LAYOUT: ClassVar[struct.Struct]
    NAME: ClassVar[str]

    def pack(self) -> bytes:
        """The struct's bytes, padding zeroed."""
        return self.LAYOUT.pack(*_VALUES_OF[type(self)](self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Raises :class:`struct.error` unless ``data`` has exactly the struct's size."""
        return cls(*cls.LAYOUT.unpack(data))

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in attrs.fields(cast("Any", cls)))


@attrs.define
class CreateArgs(Args):
    """``struct mshare_create``: put an object at ``region_offset``. Sizes and offsets in bytes."""

    NAME = "mshare_create"
    LAYOUT = struct.Struct("=QQQIII4x")
    LAYOUT_I386 = struct.Struct("=QQQIII")

    region_offset: int = 0
    size: int = 0
    offset: int = 0
    prot: int = 0
    flags: int = 0
    fd: int = 0xFFFFFFFF

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Takes the 40-byte layout and i386's 36 bytes."""
        layout = cls.LAYOUT_I386 if len(data) == cls.LAYOUT_I386.size else cls.LAYOUT
        return cls(*layout.unpack(data))


@attrs.define
class UnmapArgs(Args):
    """``struct mshare_unmap``: take a range out."""

    NAME = "mshare_unmap"
    LAYOUT = struct.Struct("=QQ")

    region_offset: int = 0
    size: int = 0


@attrs.define
class ProtectArgs(Args):
    """``struct mshare_protect``: set a range's protection. ``flags`` must be zero."""

    NAME = "mshare_protect"
    LAYOUT = struct.Struct("=QQII")

    region_offset: int = 0
    size: int = 0
    prot: int = 0
    flags: int = 0


@attrs.define
class QueryArgs(Args):
    """``struct mshare_query``: in ``region_offset``, ``query_flags``; the rest comes back."""

    NAME = "mshare_query"
    LAYOUT = struct.Struct("=QIIQQQQIIIIII")

    region_offset: int = 0
    query_flags: int = 0
    reserved: int = 0
    start: int = 0
    size: int = 0
    object_offset: int = 0
    object_ino: int = 0
    object_dev_major: int = 0
    object_dev_minor: int = 0
    prot: int = 0
    map_flags: int = 0
    kind: int = 0
    reserved2: int = 0


@attrs.define
class NotifyArgs(Args):
    """``struct mshare_notify``: watch a range. ``timeout_ms`` 0 waits for ever."""

    NAME = "mshare_notify"
    LAYOUT = struct.Struct("=QQIIIIII")

    region_offset: int = 0
    size: int = 0
    events: int = 0
    mode: int = 0
    signo: int = 0
    timeout_ms: int = 0
    on_timeout: int = 0
    flags: int = 0


@attrs.define
class SyncArgs(Args):
    """``struct mshare_sync``: write a range's file objects to their storage."""

    NAME = "mshare_sync"
    LAYOUT = struct.Struct("=QQII")

    region_offset: int = 0
    size: int = 0
    flags: int = 0
    reserved: int = 0


@attrs.define
class InfoArgs(Args):
    """``struct mshare_info_args``: what this mount is. Sizes in bytes."""

    NAME = "mshare_info_args"
    LAYOUT = struct.Struct("=IIQQQQQQQ")

    abi_version: int = ABI_VERSION
    gate: int = Gate.NONE
    features: int = 0
    alignment: int = 0
    page_size: int = PAGE_SIZE
    region_size: int = 0
    reserved0: int = 0
    reserved1: int = 0
    reserved2: int = 0


class Command(IntEnum):
    """The ioctl numbers."""

    CREATE_MAPPING = _ioc(_IOC_WRITE, 0x00, CreateArgs.LAYOUT.size)
    CREATE_MAPPING_I386 = _ioc(_IOC_WRITE, 0x00, CreateArgs.LAYOUT_I386.size)
    UNMAP = _ioc(_IOC_WRITE, 0x01, UnmapArgs.LAYOUT.size)
    PROTECT = _ioc(_IOC_WRITE, 0x10, ProtectArgs.LAYOUT.size)
    QUERY = _ioc(_IOC_WRITE | _IOC_READ, 0x11, QueryArgs.LAYOUT.size)
    NOTIFY = _ioc(_IOC_WRITE, 0x12, NotifyArgs.LAYOUT.size)
    SYNC = _ioc(_IOC_WRITE, 0x13, SyncArgs.LAYOUT.size)
    INFO = _ioc(_IOC_READ, 0x14, InfoArgs.LAYOUT.size)


ARGS_OF: Final[dict[Command, type[Args]]] = {
    Command.CREATE_MAPPING: CreateArgs,
    Command.CREATE_MAPPING_I386: CreateArgs,
    Command.UNMAP: UnmapArgs,
    Command.PROTECT: ProtectArgs,
    Command.QUERY: QueryArgs,
    Command.NOTIFY: NotifyArgs,
    Command.SYNC: SyncArgs,
    Command.INFO: InfoArgs,
}
"""Which struct a command carries."""

# attrs.astuple() takes twenty times as long.
_VALUES_OF: Final = {kind: attrgetter(*kind.field_names()) for kind in ARGS_OF.values()}
