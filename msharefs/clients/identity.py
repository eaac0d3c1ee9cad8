"""Who a thread is, and what its descriptors are, while it waits in a call of ours.

Source: proc_pid_status(5), pidfd_open(2), pidfd_getfd(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

from msharefs.region.errors import BadDescriptor, Unsupported
from msharefs.region.events import Actor

PIDFD_THREAD: Final = os.O_EXCL
SYS_PIDFD_GETFD: Final = 438
EI_CLASS: Final = 4
ELFCLASS32: Final = b"\1"
"""Where the file of a program says so: elf(5)."""

_STATUS: Final = 8192
"""Bytes that hold all of a status file, and more than enough for what is looked for at its start."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def identify(tid: int) -> Actor:
    """Process, thread and command name of a thread; what is known of it if it has gone."""
    try:
        # Half the cost of its status, and all that there is to be known of most who ask.
        os.close(os.pidfd_open(tid))  # of a process by its first thread alone
        comm = _read(f"/proc/{tid}/comm").removesuffix(b"\n")
    except (OSError, ValueError):
        return _identify_by_status(tid)
    return Actor(tid, tid, comm.decode(errors="replace"))


def _identify_by_status(tid: int) -> Actor:
    try:
        status = _read(f"/proc/{tid}/status")
    except OSError:
        return Actor(0, tid, "")
    comm = status.partition(b"Name:\t")[2].partition(b"\n")[0].decode(errors="replace")
    pid = status.partition(b"\nTgid:\t")[2].partition(b"\n")[0]
    return Actor(int(pid or 0), tid, comm)


def _read(path: str) -> bytes:
    """A file of /proc, as far as it is of interest."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _STATUS)
    finally:
        os.close(fd)


def in_own_namespace(pid: int) -> bool:
    """Whether the process has its number from the pid namespace that we are in."""
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return True


def identify_inside(pid: int, inner: int) -> Actor | None:
    """The thread of process ``pid`` that has the number ``inner`` in its own pid namespace."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return None
    for thread in threads:
        if inner_number(int(thread.name)) == inner:
            return identify(int(thread.name))
    return None


def inner_number(tid: int) -> int:
    """A thread's number in its own pid namespace; 0 if it has gone."""
    try:
        status = Path(f"/proc/{tid}/status").read_text(errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return tid


def children_of(pid: int) -> list[int]:
    """The processes whose parent it is, as /proc/PID/task/TID/children has them."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found


def parent_of(pid: int) -> int:
    """The process's parent; 0 if it has gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(") ")[2].split()[1])


def hindrance(tid: int) -> str:
    """Why a thread's process can be seen not to be adoptable, without touching it; "" if it can be.

    A program that is 64-bit by its file may still run other code, and a filter may come a moment
    later; whoever borrows it looks again.
    """
    try:
        status = Path(f"/proc/{tid}/status").read_bytes()
        with open(f"/proc/{tid}/exe", "rb", buffering=0) as program:  # noqa: PTH123 - half the cost
            head = program.read(EI_CLASS + 1)
    except OSError:
        return ""  # it has gone, or somebody is to find out by trying
    mode = status.partition(b"\nSeccomp:\t")[2][:1]
    if mode not in {b"", b"0"}:
        return "a seccomp filter is in force"
    return "a 32-bit process" if head[EI_CLASS:] == ELFCLASS32 else ""


def is_dying(tid: int) -> bool:
    """Whether the thread has gone, or has been killed and will be gone once its call ends."""
    try:
        status = Path(f"/proc/{tid}/status").read_bytes()
    except OSError:
        return True
    pending = int(status.partition(b"\nSigPnd:\t")[2].split(maxsplit=1)[0], 16)
    return bool(pending >> (signal.SIGKILL - 1) & 1)


def duplicate_descriptor(tid: int, fd: int) -> int:
    """Our own duplicate of descriptor ``fd`` of the thread ``tid``, close-on-exec.

    Raises BadDescriptor if it has no such descriptor (any more: it is ending), Unsupported if the
    thread cannot be named from here (0: it lives in a pid namespace that does not nest in ours),
    OSError otherwise.
    """
    if tid == 0:
        raise Unsupported("the caller lives in a foreign pid namespace")
    try:
        pidfd = _open_thread(tid)
    except ProcessLookupError:
        raise BadDescriptor("the calling process has ended") from None
    try:
        result = int(
            _libc.syscall(ctypes.c_long(SYS_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_uint(fd), 0)
        )
        if result < 0:
            code = ctypes.get_errno()
            if code == errno.EBADF:
                raise BadDescriptor(f"descriptor {fd} is not open in the calling process")
            if code == errno.ESRCH:
                raise BadDescriptor("the calling process has ended")
            raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
        return result
    finally:
        os.close(pidfd)


def _open_thread(tid: int) -> int:
    try:
        return os.pidfd_open(tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # Linux before 6.9 has pidfds of thread group leaders only.
    return os.pidfd_open(identify(tid).pid)
