"""What a rule refuses, as exceptions.

Each class is one row (or a few alike) of the rules table in ``docs/ioctl.md``. They carry a
sentence for the event log; which errno a program sees is decided in one place,
``service/errors.py``, and nowhere else.
"""

from __future__ import annotations


class RegionError(Exception):
    """Base: something that the rules refuse. The message is one readable line."""


class BadArgument(RegionError):
    """A flag, protection or number that has no meaning here."""


class BadRange(BadArgument):
    """A range that is empty, unaligned, overflowing, or reaches past the region's end."""


class NoRoom(RegionError):
    """No address is free at which the region could be mapped."""


class NotSized(BadArgument):
    """The region has no size yet, so nothing can lie in it."""


class BadObject(RegionError):
    """An object of a kind that may not be mapped; the message names the kind."""


class BadDescriptor(RegionError):
    """The object's descriptor is not open in the calling process."""


class ObjectAccess(RegionError):
    """The object's descriptor does not allow the protection asked for."""


class ObjectFailed(RegionError):
    """What the kernel, or the object's own filesystem, says of a call on the object.

    ``code`` is its errno, which is the program's to hear.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Occupied(RegionError):
    """The range overlaps a mapping and replacing was not allowed."""


class HoleInRange(RegionError):
    """A protection change over a range that is not mapped throughout."""


class NothingThere(RegionError):
    """No mapping covers the offset (or follows it)."""


class AccessHole(RegionError):
    """read() or write() of an offset where nothing is mapped."""


class AccessDenied(RegionError):
    """An access that the mapping's protection forbids."""


class ModeTooNarrow(RegionError):
    """open() or mmap() that asks for less than the protections inside."""


class PrivateMapping(RegionError):
    """mmap() of a region with MAP_PRIVATE: a copy is no share."""


class DescriptorReadOnly(RegionError):
    """A change asked for through a descriptor that is not open for writing."""


class RightsInUse(RegionError):
    """The change would add a right that a live descriptor or mapping lacks."""


class NoSpace(RegionError):
    """The mount's size limit leaves no room."""


class Unsupported(RegionError):
    """Understood, valid, and not to be had on this mount."""


class NotAdoptable(RegionError):
    """The process cannot be made to obey: traced, 32-bit, seccomp ...; the message says which."""


class ClientStuck(RegionError):
    """A thread of the process did not stop in time: uninterruptible sleep, or frozen."""


class StaleChange(RuntimeError):
    """A change was applied to a table other than the one it was planned for: a bug of ours."""
