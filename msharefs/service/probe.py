"""What this machine has of what a mount needs: found out by trying, once, never by a version.

Each probe does the thing itself on something of its own and cleans up after it; the trial mount
lives in a private mount namespace of a child process, so nobody else ever sees it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.memory import tmpfs

if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS: Final = 0x0002_0000
MS_REC_PRIVATE: Final = 0x4000 | 0x0004_0000
SYS_USERFAULTFD: Final = 323
UFFDIO_API: Final = 0xC018AA3F
UFFD_API: Final = 0xAA
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
CAP_SYS_PTRACE: Final = 19
CAP_SYS_ADMIN: Final = 21
PATIENCE_MS: Final = 5000


@attrs.frozen
class Finding:
    """``required``: without it no mount works. ``mend`` says what to do about a lack."""

    name: str
    required: bool
    ok: bool
    found: str
    mend: str


def probe_all() -> list[Finding]:
    """Every probe, in the order in which one would mend what is missing."""
    return [_finding(*row) for row in _PROBES]


def _finding(name: str, required: bool, probe: Callable[[], str], mend: str) -> Finding:
    try:
        return Finding(name, required, ok=True, found=probe(), mend="")
    except (OSError, ImportError) as error:
        return Finding(name, required, ok=False, found=str(error), mend=mend)


def _capabilities() -> str:
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:\t")[2].split("\n")[0], 16)
    for name, bit in (("CAP_SYS_ADMIN", CAP_SYS_ADMIN), ("CAP_SYS_PTRACE", CAP_SYS_PTRACE)):
        if not effective >> bit & 1:
            raise PermissionError(errno.EPERM, f"{name} is missing")
    return "CAP_SYS_ADMIN and CAP_SYS_PTRACE"


def _device() -> str:
    os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    return "/dev/fuse opens"


def _passthrough() -> str:
    """Mount, answer INIT by hand, and hand the kernel a memfd as a backing file."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.close(readable)
        try:
            answer = _trial_mount()
        except BaseException as error:  # noqa: BLE001 - the child must end here, whatever it is
            answer = f"!{error}"
        os.write(writable, answer.encode()[:500])
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as result:
        text = result.read().decode(errors="replace")
    os.waitpid(child, 0)
    if text.startswith("!") or not text:
        raise OSError(errno.EOPNOTSUPP, text[1:] or "the trial ended without a word")
    return text


def _trial_mount() -> str:
    from msharefs.fuse.mount import mount  # noqa: PLC0415 - only the child needs it

    if _libc.unshare(CLONE_NEWNS) or _libc.mount(
        b"none", b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None
    ):
        code = ctypes.get_errno()
        raise OSError(code, f"a private mount namespace: {os.strerror(code)}")
    with tempfile.TemporaryDirectory(prefix="msharefs-check.") as directory:
        device = mount(directory, source="msharefs-check")
        try:
            return _try_passthrough(device)
        finally:
            _libc.umount2(os.fsencode(directory), 2)
            os.close(device)


def _try_passthrough(device: int) -> str:
    poll = select.poll()
    poll.register(device, select.POLLIN)
    if not poll.poll(PATIENCE_MS):
        raise OSError(errno.ETIMEDOUT, "the kernel sent no INIT")
    frame = os.read(device, 1 << 20)
    _length, _opcode, unique = struct.unpack_from("<IIQ", frame)
    major, minor, readahead, flags = struct.unpack_from("<IIII", frame, 40)
    flags2 = struct.unpack_from("<I", frame, 56)[0] if flags & 1 << 30 else 0
    if not flags2 & 1 << 5:
        raise OSError(errno.EOPNOTSUPP, f"the kernel's FUSE {major}.{minor} does not offer it")
    reply = struct.pack(
        "<IIIIHHIIHHIIH", 7, minor, readahead, 1 << 30, 16, 12, 1 << 17, 1, 0, 0, 1 << 5, 1, 0
    ).ljust(64, b"\0")
    os.write(device, struct.pack("<IiQ", 16 + len(reply), 0, unique) + reply)
    memory = os.memfd_create("msharefs-check", os.MFD_CLOEXEC)
    try:
        fcntl.ioctl(device, 0x4010E501, bytearray(struct.pack("<iIQ", memory, 0, 0)))
    finally:
        os.close(memory)
    return f"FUSE {major}.{minor} takes a memfd as a backing file"


def _pidfd_getfd() -> str:
    pidfd = os.pidfd_open(os.getpid())
    try:
        fd = int(_libc.syscall(ctypes.c_long(438), pidfd, 0, 0))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        os.close(fd)
    finally:
        os.close(pidfd)
    return "works"


def _tmpfs() -> str:
    os.close(tmpfs.open_detached({"size": "4096", "huge": "within_size"}))
    return "a detached tmpfs with size= and huge="


def _userfaultfd() -> str:
    fd = int(_libc.syscall(ctypes.c_long(SYS_USERFAULTFD), os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        answer = bytearray(struct.pack("<QQQ", UFFD_API, 0, 0))
        fcntl.ioctl(fd, UFFDIO_API, answer)
        features = struct.unpack_from("<Q", answer, 8)[0]
    finally:
        os.close(fd)
    if not features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM:
        raise OSError(errno.EOPNOTSUPP, "no write-protection of shared memory")
    return f"features {features:#x}"


def _pyfuse3() -> str:
    import pyfuse3  # noqa: PLC0415 - whether it can be imported is the question

    return f"pyfuse3 {pyfuse3.__version__}"


def _bpf_lsm() -> str:
    names = Path("/sys/kernel/security/lsm").read_text().strip()
    if "bpf" not in names.split(","):
        raise OSError(errno.EOPNOTSUPP, f"not in the list ({names})")
    return names


_PROBES: Final = (
    ("root", True, _capabilities, "run as root"),
    ("fuse-device", True, _device, "modprobe fuse; in a container: give it /dev/fuse"),
    ("pyfuse3", True, _pyfuse3, "scripts/setup"),
    (
        "fuse-passthrough",
        True,
        _passthrough,
        "needs a kernel with CONFIG_FUSE_PASSTHROUGH (Linux 6.9 or newer has it)",
    ),
    ("pidfd-getfd", False, _pidfd_getfd, "file objects will not be had; a seccomp filter?"),
    ("detached-tmpfs", False, _tmpfs, "mount options size= and huge= will not be had"),
    ("userfaultfd", False, _userfaultfd, "CONFIG_USERFAULTFD; notifications will need it"),
    ("bpf-lsm", False, _bpf_lsm, "boot with lsm=...,bpf; the mmap gate will need it"),
)
