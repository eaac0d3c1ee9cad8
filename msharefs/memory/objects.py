"""The files that lie in the regions of a mount.

For: reading, writing and syncing a file through a region, and handing its descriptor to whoever
lays it into the clients (FUSE passthrough: their loads and stores never come here).

Promises: one descriptor for each file and set of rights, however many mappings of however many
regions show it, open for as long as somebody holds it and closed after that, by a thread: closing
may wait for the file's filesystem, and takes its time when that was the last of a deleted file.
What runs in a thread keeps the descriptor open until it is done, whoever lets go meanwhile.

Leaves out: which files may be taken (``examine.py``), what of them may be seen (the table).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio

from msharefs.abi import Kind, Prot
from msharefs.region.errors import ObjectFailed
from msharefs.region.mapping import ObjectRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outcome import Outcome

    from msharefs.memory.examine import Examined, Identity

RWF_NOAPPEND: Final = 0x20
"""pwritev2(2), Linux 6.9."""
THREADS: Final = 8
"""Calls that may wait for one file at once; more wait their turn, and for no other file."""

_stamps: Final = itertools.count(1)


def stamp() -> int:
    """A number larger than any before."""
    return next(_stamps)


LOOK_AGAIN: Final = 0.1
"""Seconds between two looks at whether a cancelled caller still wants to wait."""

T = TypeVar("T")


@attrs.define(eq=False)
class FileObject:
    """A file that lies in some region. Offsets and sizes in bytes, within the file.

    ``ref`` is how the tables name it, ``max_prot`` the most that a mapping of it may be given,
    ``shmem`` whether it is memory without storage (tmpfs, memfd), ``path`` for people. What the
    filesystem refuses comes as ObjectFailed with its errno.
    """

    fd: int
    ref: ObjectRef
    max_prot: Prot
    shmem: bool
    path: str
    own: bool = True
    """Whether the open file description is ours alone."""
    listed: tuple[int, int] | None = None
    """Device (as ``st_dev``) and inode that its mappings are listed with; None: not known yet."""
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(THREADS))
    _lock: threading.Lock = attrs.field(factory=threading.Lock)
    failure: tuple[int, ObjectFailed] | None = None
    """The last sync that failed, with the :func:`stamp` of it. The kernel tells of a lost write
    once for each open file description, and that is all our callers' one."""
    _users: int = 0
    _retired: bool = False

    @property
    def ident(self) -> int:
        return self.ref.ident

    @property
    def writable(self) -> bool:
        return bool(self.max_prot & Prot.WRITE)

    @property
    def path_now(self) -> bytes:
        """Its path as ``/proc/PID/maps`` has it: renamed since, or with `` (deleted)``."""
        try:
            return os.readlink(b"/proc/self/fd/%d" % self.fd)  # noqa: PTH115 - bytes are wanted
        except OSError:
            return os.fsencode(self.path)

    @property
    def size(self) -> int:
        """Where the file ends now. May block."""
        with self._failing("fstat"):
            return os.fstat(self.fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        """pread(2): short at the end of the file, empty beyond it. May block."""
        with self._failing("read"):
            return os.pread(self.fd, size, offset)

    def read_now(self, offset: int, size: int) -> bytes | None:
        """As :meth:`read`, if all of it is there without waiting for anything; else None."""
        try:
            if self.shmem:
                data = os.pread(self.fd, size, offset)
            else:
                buffer = bytearray(size)
                count = os.preadv(self.fd, (buffer,), offset, os.RWF_NOWAIT)
                data = bytes(buffer) if count == size else b""
        except OSError:  # EAGAIN, or EOPNOTSUPP: such a filesystem cannot promise not to wait
            return None
        return data if len(data) == size else None

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """pwrite(2) of what fits before the end of the file: how much, 0 at its end. May block.

        A file that is cut shorter at this very moment may be made longer again by it, as by any
        write() that comes a moment later.
        """
        data = memoryview(data)[: max(self.size - offset, 0)]
        if not data:
            return 0
        with self._failing("write"):
            if self.own:
                return os.pwrite(self.fd, data, offset)
            # pwrite(2), Bugs: with O_APPEND it appends, whatever the offset.
            return os.pwritev(self.fd, (data,), offset, RWF_NOAPPEND)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) for SEEK_DATA and SEEK_HOLE: the next offset. May block."""
        with self._failing("lseek"):
            return os.lseek(self.fd, offset, whence)

    def sync(self, *, data_only: bool = False) -> None:
        """fsync(2), or fdatasync(2). May block, and may tell of a write that failed earlier."""
        try:
            with self._failing("fsync"):
                (os.fdatasync if data_only else os.fsync)(self.fd)
        except ObjectFailed as error:
            self.failure = stamp(), error
            raise

    async def in_thread(
        self,
        work: Callable[[], T],
        go_on: Callable[[], bool] = lambda: False,
        *,
        beside: FileObject | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> T:
        """Run what may block, with the file (and the one ``beside`` it) kept open for it.

        Once cancelled it is waited for only as long as ``go_on`` says; without us it goes on to
        its end all the same. At that end, or if it never begins, ``ended`` is called.
        """
        token, ticket = trio.lowlevel.current_trio_token(), object()
        try:
            await self._limiter.acquire_on_behalf_of(ticket)
        except BaseException:
            ended()
            raise
        done, outcomes = trio.Event(), []

        def finish(outcome: Outcome[T]) -> None:
            self._limiter.release_on_behalf_of(ticket)
            ended()
            outcomes.append(outcome)
            done.set()

        def deliver(outcome: Outcome[T]) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(finish, outcome)

        work = self.using(work)
        if beside is not None:
            work = beside.using(work)
        trio.lowlevel.start_thread_soon(work, deliver)
        try:
            await done.wait()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                while not done.is_set() and go_on():
                    with trio.move_on_after(LOOK_AGAIN):
                        await done.wait()
            if not done.is_set():
                raise
        return outcomes[0].unwrap()

    def using(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work``, which must be called, with this file kept open until it is done."""
        with self._lock:
            self._users += 1

        def run() -> T:
            try:
                return work()
            finally:
                self._leave()

        return run

    def _leave(self) -> None:
        """Somebody is done with the descriptor. From any thread."""
        with self._lock:
            self._users -= 1
            last = self._retired and not self._users
        if last:
            self._close()

    def retire(self) -> None:
        """Nobody holds the file any more: close it when the last thread is done with it."""
        with self._lock:
            self._retired = True
            last = not self._users
        if last:
            trio.lowlevel.start_thread_soon(self._close, lambda _outcome: None)

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):  # NFS tells of lost writes: fsync() is the place to ask
            os.close(fd)

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            code = error.errno or 0
            raise ObjectFailed(code, f"{what} of {self.path}: {os.strerror(code)}") from error


class Objects:
    """The file objects of one mount. For the loop."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[Identity, Prot], FileObject] = {}
        self._by_ident: dict[int, FileObject] = {}
        self._keys: dict[int, tuple[Identity, Prot]] = {}
        self._holds: dict[int, int] = {}
        self._last = 0

    def __len__(self) -> int:
        return len(self._by_ident)

    def take(self, found: Examined) -> FileObject:
        """The object of a file that was examined, held once for the caller. Takes ``found`` over.

        One that is held already, if it is the same file with the same rights.
        """
        key = (found.identity, found.max_prot)
        known = self._by_key.get(key)
        if known is not None:
            self.hold(known.ident)
            found.discard()
            return known
        self._last += 1
        device, ino, _ = found.identity
        numbers = (os.major(device), os.minor(device), ino)
        ref = ObjectRef(Kind.FILE, self._last, *numbers, stored=not found.shmem)
        made = FileObject(found.fd, ref, found.max_prot, found.shmem, found.path, found.own)
        self._by_key[key] = self._by_ident[made.ident] = made
        self._keys[made.ident] = key
        self._holds[made.ident] = 1
        return made

    def of(self, ident: int) -> FileObject:
        """Raises KeyError if nobody holds it: a bug of ours."""
        return self._by_ident[ident]

    def hold(self, ident: int) -> FileObject:
        """One more who needs it; to be matched by :meth:`release`."""
        self._holds[ident] += 1
        return self._by_ident[ident]

    def release(self, ident: int) -> None:
        """One fewer. The last closes it."""
        self._holds[ident] -= 1
        if not self._holds[ident]:
            del self._holds[ident], self._by_key[self._keys.pop(ident)]
            self._by_ident.pop(ident).retire()
