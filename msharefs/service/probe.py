"""What this machine has of what a mount needs: found out by trying, once, never by a version.

Each probe does the thing itself on something of its own and cleans up after it; the trial mount
is attached to no directory, so nobody else ever sees it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from msharefs.clients import native
from msharefs.clients.gate import GateUnavailable
from msharefs.clients.pagemap import try_noting
from msharefs.memory import tmpfs
from msharefs.service.gates import open_lsm_gate
from msharefs.service.tryout import checked, other_process, try_ptrace

if TYPE_CHECKING:
    from collections.abc import Callable

_libc = ctypes.CDLL(None, use_errno=True)

SYS_USERFAULTFD: Final = 323
SYS_PIDFD_GETFD: Final = 438
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
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        return Finding(name, required, ok=False, found=f"{about}{error.strerror}", mend=mend)
    except ImportError as error:
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
    """Mount where nobody sees it, answer INIT by hand, hand the kernel a memfd as backing file."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = {"fd": str(device), "rootmode": "40000", "user_id": "0", "group_id": "0"}
        mounted = tmpfs.open_detached(options, "fuse")
        try:
            return _try_passthrough(device)
        finally:
            os.close(mounted)
    finally:
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
    with other_process() as child:
        pidfd = os.pidfd_open(child)
        try:
            os.close(checked(int(_libc.syscall(ctypes.c_long(SYS_PIDFD_GETFD), pidfd, 0, 0))))
        finally:
            os.close(pidfd)
    return "takes a descriptor from another process"


def _ptrace() -> str:
    try_ptrace()
    return "may hold another process"


def _tmpfs() -> str:
    os.close(tmpfs.open_detached({"size": "4096", "huge": "within_size"}))
    return "a detached tmpfs with size= and huge="


def _userfaultfd() -> str:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = checked(int(_libc.syscall(ctypes.c_long(SYS_USERFAULTFD), flags)))
    try:
        answer = bytearray(struct.pack("<QQQ", UFFD_API, 0, 0))
        fcntl.ioctl(fd, UFFDIO_API, answer)
        features = struct.unpack_from("<Q", answer, 8)[0]
    finally:
        os.close(fd)
    if not features & UFFD_FEATURE_WP_HUGETLBFS_SHMEM:
        raise OSError(errno.EOPNOTSUPP, "no write-protection of shared memory")
    return f"features {features:#x}"


def _noting() -> str:
    try_noting()
    return "the kernel notes stores by itself (WP_ASYNC, PAGEMAP_SCAN)"


def _pyfuse3() -> str:
    import pyfuse3  # noqa: PLC0415 - whether it can be imported is the question

    return f"pyfuse3 {pyfuse3.__version__}"


def _compiled() -> str:
    if not native.present:
        raise OSError(errno.ENOENT, f"pure Python is in use ({native.why})")
    return "the compiled module is in use"


def _lsm_gate() -> str:
    """Load, attach, and see both programs refuse a call and let one through."""
    try:
        open_lsm_gate(lenient=True).close()
    except GateUnavailable as error:
        raise OSError(errno.EOPNOTSUPP, str(error)) from error
    return "the mmap gate's programs load, attach and refuse"


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
    (
        "ptrace",
        False,
        _ptrace,
        "gate=ptrace and adoption need it: kernel.yama.ptrace_scope below 3, and no seccomp filter",
    ),
    ("detached-tmpfs", False, _tmpfs, "mount options size= and huge= will not be had"),
    ("userfaultfd", False, _userfaultfd, "CONFIG_USERFAULTFD; notifications will need it"),
    (
        "noted-stores",
        False,
        _noting,
        "mshare notify --scan, and log of files on storage, need Linux 6.7 or newer",
    ),
    (
        "many-clients",
        False,
        _compiled,
        "scripts/setup compiles it (x86-64); without it, changes of many clients take longer",
    ),
    (
        "lsm-gate",
        False,
        _lsm_gate,
        "scripts/setup --lsm; a kernel with CONFIG_BPF_LSM, booted with lsm=...,bpf",
    ),
)
