"""A tmpfs of our own, mounted nowhere.

For: backing files with a huge-page policy, a size limit that the kernel enforces even on pages
touched through a mapping, and a device number of their own. The superblock exists for as long as
one of its descriptors (or a mapping of one of its files) does; nothing shows up in the mount
table and nothing has to be unmounted.

Source: fsopen(2), fsconfig(2), fsmount(2); tmpfs(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

SYS_FSOPEN: Final = 430
SYS_FSCONFIG: Final = 431
SYS_FSMOUNT: Final = 432
FSOPEN_CLOEXEC: Final = 1
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
FSMOUNT_CLOEXEC: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4

HUGE_POLICIES: Final = ("never", "advise", "always", "within_size")
"""tmpfs(5), ``huge=``."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _syscall(what: str, number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def open_detached(options: dict[str, str], fstype: str = "tmpfs") -> int:
    """Make a tmpfs with ``options`` (tmpfs(5)) and return a descriptor of its root directory.

    Any other ``fstype`` is made in the same way. Raises OSError: EPERM without CAP_SYS_ADMIN,
    EINVAL for an option that this kernel does not take (``huge=`` without
    CONFIG_TRANSPARENT_HUGEPAGE), ENOSYS before Linux 5.2.
    """
    context = _syscall("fsopen", SYS_FSOPEN, ctypes.c_char_p(fstype.encode()), FSOPEN_CLOEXEC)
    try:
        for key, value in {"source": "msharefs", **options}.items():
            _syscall(
                f"fsconfig {key}={value}",
                SYS_FSCONFIG,
                context,
                FSCONFIG_SET_STRING,
                ctypes.c_char_p(key.encode()),
                ctypes.c_char_p(value.encode()),
                0,
            )
        _syscall("fsconfig create", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(
            "fsmount",
            SYS_FSMOUNT,
            context,
            FSMOUNT_CLOEXEC,
            MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
        )
    finally:
        os.close(context)


def unnamed_file(directory: int) -> int:
    """A new empty file without a name on the filesystem of ``directory`` (open(2), O_TMPFILE)."""
    return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)


def supported(options: dict[str, str]) -> OSError | None:
    """Try it once: None if such a tmpfs can be made, else why not."""
    try:
        os.close(open_detached(options))
    except OSError as error:
        return error
    return None


def is_missing(error: OSError) -> bool:
    """Whether ``error`` says that the kernel lacks the feature, rather than that a call failed."""
    return error.errno in {errno.ENOSYS, errno.EINVAL, errno.EPERM}
