"""The errno boundary: the one place where an exception becomes the errno that a program sees.

Rules raise :mod:`msharefs.region.errors`, the namespace raises what is defined here, the kernel
raises OSError. Whatever else arrives is a bug: it is logged with its traceback and becomes EIO
for that one request, and the mount lives on.
"""

from __future__ import annotations

import errno
import functools
import logging
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pyfuse3

from msharefs.region import errors as region

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class NamespaceError(Exception):
    """Base: a name that cannot be found, made or removed."""


class NoSuchName(NamespaceError):
    """Nothing has that name, or the node has gone."""


class NameTaken(NamespaceError):
    """Something has that name already."""


class NameTooLong(NamespaceError):
    """Longer than NAME_MAX (255 bytes)."""


class NotADirectory(NamespaceError):
    """A directory was needed."""


class IsADirectory(NamespaceError):
    """Anything but a directory was needed."""


class NotALink(NamespaceError):
    """A symbolic link was needed."""


class NotEmpty(NamespaceError):
    """The directory holds names."""


class Reserved(NamespaceError):
    """The name or node belongs to the mount itself and stays as it is."""


class BadRename(NamespaceError):
    """A directory cannot move into itself; unknown flags."""


class NotAnIoctl(Exception):
    """The file has no such ioctl."""


class NoSuchAttribute(Exception):
    """The file has no extended attribute of that name."""


class NotOpenForThat(Exception):
    """The descriptor does not belong to what the request says."""


class WouldBlock(Exception):
    """Nothing to read now, and the descriptor is non-blocking."""


ERRNO_OF: Final[dict[type[BaseException], int]] = {
    region.BadArgument: errno.EINVAL,
    region.BadObject: errno.EINVAL,
    region.BadDescriptor: errno.EBADF,
    region.ObjectAccess: errno.EACCES,
    region.Occupied: errno.EEXIST,
    region.HoleInRange: errno.ENOMEM,
    region.NothingThere: errno.ENOENT,
    region.NoRoom: errno.ENOMEM,
    region.AccessHole: errno.ENXIO,
    region.AccessDenied: errno.EACCES,
    region.ModeTooNarrow: errno.EACCES,
    region.PrivateMapping: errno.EINVAL,
    region.DescriptorReadOnly: errno.EACCES,
    region.RightsInUse: errno.EBUSY,
    region.NoSpace: errno.ENOSPC,
    region.Unsupported: errno.EOPNOTSUPP,
    region.NotAdoptable: errno.EPERM,
    region.ClientStuck: errno.ETIMEDOUT,
    NoSuchName: errno.ENOENT,
    NameTaken: errno.EEXIST,
    NameTooLong: errno.ENAMETOOLONG,
    NotADirectory: errno.ENOTDIR,
    IsADirectory: errno.EISDIR,
    NotALink: errno.EINVAL,
    NotEmpty: errno.ENOTEMPTY,
    Reserved: errno.EPERM,
    BadRename: errno.EINVAL,
    NotAnIoctl: errno.ENOTTY,
    NoSuchAttribute: errno.ENODATA,
    NotOpenForThat: errno.EBADF,
    WouldBlock: errno.EAGAIN,
}

KERNEL_ANSWERS: Final = frozenset(
    {errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EDQUOT}
)
"""What the kernel may say of a backing file and the caller should hear. Any other OSError in a
handler means that we did something wrong with a descriptor of our own."""


def errno_of(error: BaseException, what: str) -> int:
    """The errno for ``error``, which came up while doing ``what``."""
    if isinstance(error, pyfuse3.FUSEError):
        return error.errno
    if isinstance(error, region.ObjectFailed):
        log.info("%s: %s", what, error)
        return error.code
    for kind in type(error).__mro__:
        if kind in ERRNO_OF:
            return ERRNO_OF[kind]
    if isinstance(error, OSError) and error.errno in KERNEL_ANSWERS:
        log.warning("%s: %s", what, error)
        return int(error.errno)
    log.error("%s failed, the caller gets EIO", what, exc_info=error)
    return errno.EIO


_Operations = TypeVar("_Operations", bound=type[pyfuse3.Operations])


def guarded(cls: _Operations) -> _Operations:
    """Class decorator: every handler that ``cls`` defines answers with an errno, never otherwise.

    An exception other than FUSEError in a handler would end pyfuse3's loop, and the mount for
    every user with it.
    """
    for name in vars(pyfuse3.Operations):
        handler = vars(cls).get(name)
        if callable(handler) and not name.startswith("_") and name not in {"init", "stacktrace"}:
            setattr(cls, name, _guard(handler, name))
    return cls


def _guard(handler: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def guard(*arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(errno_of(error, name)) from error

    return guard
