"""Lay files over ranges of another process: it opens them itself, and maps them.

For: the steps of a replica that show something else than before (:class:`~msharefs.clients.replica.Map`).
A descriptor cannot be put into another process from outside, so a borrowed thread opens the file by
its path, maps it, and closes it again.

Promises: one open() for each file, however many ranges; no descriptor is left, nor any memory, if
the thread lives. A range that cannot be laid is left as it was. Nothing else of the process is
touched but the addresses given.

Leaves out: which files these are, and answering the open(), which comes to this very server: while
a thread is borrowed, whoever answers must not wait for it. What goes with a mapping's address range
and not with its content goes with the old mapping: mlock(2), madvise(2), mbind(2).

Sources: mmap(2), open(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import attrs

from msharefs.clients.arch import Number
from msharefs.clients.gone import Gone
from msharefs.clients.identity import hindrance
from msharefs.region.errors import NotAdoptable, ObjectFailed

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from msharefs.clients.borrow import Body, Borrowed
    from msharefs.clients.replica import Map
    from msharefs.clients.tracer import Session

MAP_SHARED_FIXED: Final = 0x11
TRIES: Final = 16
_PATH_FAULTS: Final = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EACCES,
        errno.ELOOP,
        errno.EROFS,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.EXDEV,
        errno.ENOTCONN,
    }
)
"""By which open() says that the process cannot reach the file as things are."""


class Door(Protocol):
    """Whoever answers the open(): told which thread is to be let in."""

    def expect(self, tid: int, inode: int, flags: int) -> None:
        """From now on ``tid`` may open the file, with just these flags, and map it."""

    def expect_no_more(self, tid: int) -> None:
        """Nor anything else."""


@attrs.frozen
class Laid:
    """A file and where it goes. ``path`` is as the process sees it, ``flags`` are open(2)'s.

    The file's offset 0 is the region's ``delta``.
    """

    inode: int
    path: bytes
    flags: int
    delta: int
    steps: Sequence[Map]


def laying(
    files: Sequence[Laid], door: Door, left: tuple[int, int, int] = (-1, 0, -1)
) -> Body[None]:
    """What a borrowed thread does for it.

    ``left`` by somebody who began with it: address and size of memory, and a descriptor; -1 if
    there is none. Raises NotAdoptable (the file is not to be reached from there), OSError (EMFILE,
    ENOMEM ...), ObjectFailed (the file's own refusal of the mapping).
    """

    def body(thread: Borrowed) -> Session[None]:
        address, size, fd = left
        if fd >= 0:
            yield from thread.call(Number.CLOSE, fd)
        if address >= 0:
            yield from thread.call(Number.MUNMAP, address, size)
        for laid in files:
            address = yield from thread.push(laid.path + b"\0")
            door.expect(thread.tid, laid.inode, laid.flags)
            try:
                yield from _lay(thread, laid, address)
            finally:
                door.expect_no_more(thread.tid)

    return body


def unmapping(address: int, size: int) -> Body[None]:
    """What a borrowed thread does to take a mapping of its process away. Raises OSError."""

    def body(thread: Borrowed) -> Session[None]:
        result = yield from thread.call(Number.MUNMAP, address, size)
        if result < 0:
            raise OSError(-result, f"process {thread.pid}: munmap: {os.strerror(-result)}")

    return body


def _call(thread: Borrowed, number: Number, *arguments: int) -> Session[int]:
    """One that is interrupted for no reason of its own is made again: who was killed is Gone then."""
    for _ in range(TRIES):
        result = yield from thread.call(number, *arguments)
        if result != -errno.EINTR:
            break
    return result


def _lay(thread: Borrowed, laid: Laid, path: int) -> Session[None]:
    flags = laid.flags | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = yield from _call(thread, Number.OPEN, path, flags, 0)
    if fd < 0:
        raise cannot_open(thread.pid, -fd, laid.path)
    failed: Exception | None = None
    for step in laid.steps:
        result = yield from _call(
            thread,
            Number.MMAP,
            step.address,
            step.size,
            int(step.prot),
            MAP_SHARED_FIXED,
            fd,
            step.offset - laid.delta,
        )
        if result != step.address:
            failed = cannot_map(thread.pid, -result, step.prot.text())
            break
    yield from thread.call(Number.CLOSE, fd)
    if failed is not None:
        raise failed


def cannot_open(pid: int, code: int, path: bytes) -> Exception:
    """What open(2) of a file to be laid says by an errno."""
    text = f"process {pid} cannot open {os.fsdecode(path)}: {os.strerror(code)}"
    return NotAdoptable(text) if code in _PATH_FAULTS else OSError(code, text)


def cannot_map(pid: int, code: int, prot: str) -> Exception:
    """What mmap(2) of it says."""
    text = f"process {pid}: mmap {prot}: {os.strerror(code)}"
    return OSError(code, text) if code == errno.ENOMEM else ObjectFailed(code, text)


def mount_path(pid: int, device: int, known: dict[Hashable, bytes] | None = None) -> bytes:
    """Where a process sees the root of the mounted filesystem with that st_dev.

    Of several mounts the last made. Raises NotAdoptable if it sees none: it lives in another mount
    namespace, or below another root. ``known``: what was found just now for others, by namespace
    and root; the table of all mounts takes the kernel longer to write than the rest takes us.
    """
    view: Hashable = None
    if known is not None:
        view = _view_of(pid)
        if view in known:
            return known[view]
    wanted = b"%d:%d" % (os.major(device), os.minor(device))
    found = b""
    try:
        table = Path(f"/proc/{pid}/mountinfo").read_bytes()
    except OSError:
        raise Gone(f"process {pid}") from None
    for line in table.splitlines():
        fields = line.split(b" ", 5)
        if len(fields) == 6 and fields[2] == wanted and fields[3] == b"/":
            found = fields[4]
    if not found:
        raise NotAdoptable(f"process {pid} does not see the mount: another root or mount namespace")
    path = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), found).rstrip(b"/")
    if known is not None:
        known[view] = path
    return path


def _view_of(pid: int) -> Hashable:
    """What the paths of a process are relative to: its mount namespace, and its root in that."""
    try:
        root = os.stat(f"/proc/{pid}/root")  # noqa: PTH116 - of what the link leads to
        names = [os.readlink(f"/proc/{pid}/{name}") for name in ("ns/mnt", "root")]  # noqa: PTH115
    except OSError:
        raise Gone(f"process {pid}") from None
    return root.st_dev, root.st_ino, *names


_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")


def obstacle(pid: int, device: int) -> Exception | None:
    """What would keep a process from opening a file of the mount, as far as it can be seen.

    For one that cannot be asked, since it waits for us. Not seen: permissions on the way there.
    """
    try:
        mount_path(pid, device)
        status = Path(f"/proc/{pid}/status").read_bytes()
        if reason := hindrance(pid):
            return NotAdoptable(reason)
        tracer = int(status.partition(b"\nTracerPid:\t")[2].split(b"\n", 1)[0])
        if tracer and not Path(f"/proc/self/task/{tracer}").exists():
            return NotAdoptable(f"traced by process {tracer}")
        limit = (
            Path(f"/proc/{pid}/limits").read_bytes().partition(b"\nMax open files")[2].split()[0]
        )
        if len(os.listdir(f"/proc/{pid}/fd")) >= int(limit):  # noqa: PTH208 - names alone
            return OSError(errno.EMFILE, f"process {pid}: {os.strerror(errno.EMFILE)}")
    except NotAdoptable as error:
        return error
    except (OSError, Gone, ValueError):  # it has gone, or its limit is "unlimited"
        return None
    return None
