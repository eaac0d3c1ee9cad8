"""Mounting and unmounting, and what is mounted: mount(2), umount2(2), /proc/self/mountinfo.

Promises: what is mounted is FUSE, on a directory where nothing else is mounted; an error is one
line that says what to do. Leaves out: serving (`session`). A device that `mount` returned may just
as well be served by a process that is started later.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from pathlib import Path
from typing import Final

import attrs

FSTYPE: Final = "fuse.msharefs"
_DEVICE: Final = "/dev/fuse"

# <linux/mount.h>
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_NOATIME: Final = 1024
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_MAX_LINKS: Final = 40  # as path_resolution(7)

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(OSError):
    """Mounting or unmounting failed. ``str()`` is one line that says what to do about it."""

    def __init__(self, errno_: int, message: str) -> None:
        super().__init__(errno_, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


@attrs.frozen(kw_only=True)
class MountOptions:
    """What mount(2) is told beside the file system: see mount(8), and FUSE's own in fuse(8).

    nosuid and nodev are always set: nothing here is ever a program or a device to be trusted.
    """

    allow_other: bool = True
    default_permissions: bool = True
    read_only: bool = False
    noexec: bool = False
    noatime: bool = False

    @property
    def flags(self) -> int:
        flags = _MS_NOSUID | _MS_NODEV
        flags |= _MS_RDONLY if self.read_only else 0
        flags |= _MS_NOEXEC if self.noexec else 0
        flags |= _MS_NOATIME if self.noatime else 0
        return flags


@attrs.frozen
class Mount:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)).

    ``device`` is the file system's device number (major, minor): all mounts of one file system
    share it, and no other file system that is mounted at the same time has it.
    """

    mount_id: int
    device: tuple[int, int]
    mountpoint: str
    fstype: str
    source: str
    options: frozenset[str]


def mount(
    mountpoint: str | os.PathLike[str],
    *,
    source: str,
    subtype: str = "msharefs",
    options: MountOptions | None = None,
) -> int:
    """Mount on the directory ``mountpoint`` and return the FUSE device, non-blocking, close-on-exec.

    Needs CAP_SYS_ADMIN. The mount lives as long as the device is open somewhere and nobody
    unmounts; until requests are read from the device, access to the mount waits. ``source`` is
    what df(1) shows in its first column.

    Raises `MountError`: ENOENT, ENOTDIR, EBUSY (something is mounted exactly there), EPERM, and
    ENODEV where the kernel has no FUSE.
    """
    options = options or MountOptions()
    path = _usable_mountpoint(mountpoint)
    device = _open_device()
    # rootmode: the type bits alone; the mode is asked of the file system.
    data = f"fd={device},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()}"
    data += ",default_permissions" if options.default_permissions else ""
    data += ",allow_other" if options.allow_other else ""
    args = (source.encode(), os.fsencode(path), f"fuse.{subtype}".encode())
    if _libc.mount(*args, ctypes.c_ulong(options.flags), data.encode()) != 0:
        code = ctypes.get_errno()
        os.close(device)
        raise _mount_error(code, path)
    return device


def unmount(mountpoint: str | os.PathLike[str], *, detach: bool = False) -> None:
    """Unmount what is mounted at ``mountpoint``.

    ``detach`` takes it out of the namespace at once even if it is in use (umount2(2),
    MNT_DETACH). Never call this from the thread that serves the mount: the kernel may ask it
    something before it lets go.

    Raises `MountError`: EBUSY (in use, without detach), EINVAL (not a mount point), EPERM.
    """
    path = os.fspath(mountpoint)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(path), flags) == 0:
        return
    code = ctypes.get_errno()
    messages = {
        errno.EBUSY: f"{path} is in use: close what is open there, or unmount lazily (umount -l)",
        errno.EINVAL: f"{path} is not a mount point",
        errno.ENOENT: f"{path} does not exist",
        errno.EPERM: f"unmounting {path} needs root (CAP_SYS_ADMIN)",
    }
    raise MountError(code, messages.get(code, f"cannot unmount {path}: {os.strerror(code)}"))


def find_mounts(fstype: str | None = FSTYPE) -> list[Mount]:
    """The mounts of this process's namespace, in the order in which they were made.

    ``fstype`` None: of every type.
    """
    with Path("/proc/self/mountinfo").open("rb") as table:
        mounts = [_parse_mountinfo(line) for line in table]
    return [found for found in mounts if fstype is None or found.fstype == fstype]


def mount_at(path: str | os.PathLike[str]) -> Mount | None:
    """The topmost mount whose mount point is ``path``, or None.

    Symbolic links are followed, but the mounted file system itself is asked nothing: its server
    may be dead, stopped, or the one that asks.
    """
    mounts = {found.mountpoint: found for found in find_mounts(None)}
    wanted = os.fspath(path)
    for _ in range(_MAX_LINKS):
        parent, name = os.path.split(os.path.abspath(wanted))  # noqa: PTH100 - see docstring
        wanted = os.path.join(os.path.realpath(parent), name)  # noqa: PTH118
        if wanted in mounts:
            return mounts[wanted]
        if not os.path.islink(wanted):  # noqa: PTH114
            return None
        wanted = os.path.join(parent, os.readlink(wanted))  # noqa: PTH115, PTH118
    return None


def _parse_mountinfo(line: bytes) -> Mount:
    left, _, right = line.rstrip(b"\n").partition(b" - ")
    fields = left.split(b" ")
    fstype, source, super_options = right.split(b" ")[:3]
    major, _, minor = fields[2].partition(b":")
    options = fields[5].split(b",") + super_options.split(b",")
    return Mount(
        mount_id=int(fields[0]),
        device=(int(major), int(minor)),
        mountpoint=_unescape(fields[4]),
        fstype=_unescape(fstype),
        source=_unescape(source),
        options=frozenset(_unescape(option) for option in options),
    )


def _unescape(field: bytes) -> str:
    r"""Blanks, newlines, backslashes and the like are written as ``\ooo`` in mountinfo."""
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), field)
    return os.fsdecode(plain)


def _usable_mountpoint(mountpoint: str | os.PathLike[str]) -> str:
    """The real path of a directory with nothing mounted on it. Raises `MountError`."""
    given = os.fspath(mountpoint)
    # The table first: to look at a mount whose server has died fails, or hangs if it is stopped.
    there = mount_at(given)
    if there is not None:
        raise MountError(
            errno.EBUSY,
            f"{given} is busy: {there.source} ({there.fstype}) is mounted there; "
            f"unmount it (umount {there.mountpoint}) or choose another directory",
        )
    path = os.path.realpath(given)
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        raise MountError(
            errno.ENOENT, f"{given} does not exist: make the directory first (mkdir -p {given})"
        ) from None
    except OSError as exc:
        code = exc.errno or errno.EIO
        raise MountError(code, f"cannot mount on {given}: {os.strerror(code)}") from exc
    if not stat.S_ISDIR(mode):
        raise MountError(errno.ENOTDIR, f"{given} is not a directory: mount on a directory")
    return path


def _open_device() -> int:
    try:
        return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        code = exc.errno or errno.EIO
        if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            reason = "the kernel has no FUSE here: load it (modprobe fuse), or give this container"
            raise MountError(errno.ENODEV, f"no {_DEVICE}: {reason} the device") from exc
        if code in (errno.EACCES, errno.EPERM):
            raise MountError(code, f"{_DEVICE} may not be opened: run as root") from exc
        raise MountError(code, f"cannot open {_DEVICE}: {os.strerror(code)}") from exc


def _mount_error(code: int, path: str) -> MountError:
    messages = {
        errno.EPERM: f"mounting on {path} needs root (CAP_SYS_ADMIN): run as root",
        errno.EACCES: f"mounting on {path} needs root (CAP_SYS_ADMIN): run as root",
        errno.EBUSY: f"{path} is busy: unmount what is there, or choose another directory",
        errno.ENODEV: "the kernel has no FUSE: load it (modprobe fuse)",
    }
    return MountError(code, messages.get(code, f"cannot mount on {path}: {os.strerror(code)}"))
