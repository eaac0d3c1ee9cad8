"""Regions from Python: open them, change what lies inside, map them, follow their events.

    from msharefs.client import Region

    with Region.create("/run/mshare/pool", size=1 << 21) as region:
        region.map(0, 1 << 20, "rw-")
        with region.mmap() as memory:
            memory[:5] = b"hello"
        region.protect(0, 1 << 20, "r--")
        region.map(1 << 20, 1 << 16, "r--", object="/var/lib/table")  # the file itself, shared

Offsets, sizes and lengths are bytes, and multiples of the page size wherever the kernel's are. A
protection is given as :class:`~msharefs.abi.Prot`, as mmap(2)'s number, or as ``"rw-"``.

Promises: every failure is an OSError with the errno of the system call (``docs/man/msharefs.2``
has the table) and the file's path; no thread, no event loop, no dependency on the server. Leaves
out: anything that plain ``open``, ``os.stat`` and ``os.unlink`` do as well.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import re
import select
import time
from contextlib import contextmanager, suppress
from errno import ENOENT, ENOTUNIQ
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias, TypeVar

import attrs

from msharefs.abi import (
    PAGE_SIZE,
    Args,
    Command,
    CreateArgs,
    Feature,
    Gate,
    InfoArgs,
    Kind,
    MapFlag,
    NotifyArgs,
    NotifyEvent,
    NotifyFlag,
    NotifyMode,
    OnTimeout,
    Prot,
    ProtectArgs,
    QueryArgs,
    QueryFlag,
    SyncArgs,
    UnmapArgs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

AnyPath: TypeAlias = str | os.PathLike[str]
AnyProt: TypeAlias = Prot | int | str
Event: TypeAlias = dict[str, Any]
"""``seq``, ``time`` (seconds since the epoch), ``event``, ``region``, ``offset``, ``length``,
``pid``, ``tid``, ``comm``, ``via``, and what the kind of event has beside these."""

FSTYPE: Final = "fuse.msharefs"
CONTROL: Final = ".control"
_OWN_NAMES: Final = frozenset({CONTROL, ".objects", "mshare_info"})
"""What the root directory of a mount holds beside regions and directories."""
_MOUNT_TABLE: Final = Path("/proc/self/mountinfo")
_CHUNK: Final = 1 << 16
_PATH_MAX: Final = 4096

_Args = TypeVar("_Args", bound=Args)


class NotAMount(FileNotFoundError):
    """Nothing of the kind is mounted there, or anywhere. ``strerror`` is one readable line."""


class SeveralMounts(OSError):
    """There is more than one mount, so it has to be said which."""


@attrs.frozen
class Mapping:
    """What lies at ``start`` of a region, for ``size`` bytes.

    ``object_offset`` is where that begins in the object, which for ``Kind.FILE`` is the inode
    ``object_ino`` of the device ``object_dev`` (major, minor). A ``maps`` file also tells the path
    of such a file, as the server sees it at that moment, and whether it is memory itself (tmpfs,
    memfd); a query does not: None. Two mappings are compared without these. ``huge``: memory that
    asks for huge pages.
    """

    start: int
    size: int
    prot: Prot
    kind: Kind
    object_offset: int = 0
    object_dev: tuple[int, int] = (0, 0)
    object_ino: int = 0
    huge: bool = False
    object_path: str | None = attrs.field(default=None, eq=False)
    object_shmem: bool | None = attrs.field(default=None, eq=False)

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.size


@attrs.frozen
class Info:
    """What a mount is (MSHAREFS_INFO). ``region_size`` is 0 for a directory."""

    abi_version: int
    gate: Gate
    features: Feature
    alignment: int
    page_size: int
    region_size: int


def parse_prot(prot: AnyProt) -> Prot:
    """Raises ValueError."""
    return Prot.parse(prot) if isinstance(prot, str) else Prot(prot)


def open_object(path: AnyPath, prot: AnyProt) -> int:
    """A descriptor of a file that is to be mapped with ``prot``, with no more access than it needs.

    A pipe or a terminal is not waited for: that it cannot be mapped is for the server to say.
    """
    mode = os.O_RDWR if parse_prot(prot) & Prot.WRITE else os.O_RDONLY
    return os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def union(mappings: list[Mapping]) -> Prot:
    """Every right that some mapping gives."""
    rights = Prot.NONE
    for prot in {mapping.prot for mapping in mappings}:
        rights |= prot
    return rights


@contextmanager
def _about(path: str) -> Iterator[None]:
    """Calls on a descriptor raise OSError without a name: add it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), path) from None
        raise


class Region:
    """An open region. Ends with :meth:`close`, or as a context manager; memory maps live on.

    What a mount does with each call, and every errno, is in msharefs(2).
    """

    def __init__(self, fd: int, path: AnyPath) -> None:
        """Take over ``fd``, an open descriptor of the region at ``path``."""
        self._fd = fd
        self.path: Final = os.fspath(path)

    @classmethod
    def create(cls, path: AnyPath, size: int, mode: int = 0o600) -> Self:
        """Make a region of ``size`` bytes with nothing in it; the umask applies to ``mode``.

        Raises FileExistsError if the name is taken, OSError (EINVAL) for a size that is no
        multiple of the mount's alignment. After an error there is no such region.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        region = cls(os.open(path, flags, mode), path)
        try:
            region.resize(size)
        except BaseException:
            region.close()
            os.unlink(path)  # noqa: PTH108 - as os.open above
            raise
        return region

    @classmethod
    def open(cls, path: AnyPath, *, writable: bool = True) -> Self:
        """Open an existing region; to change anything in it, it must be ``writable``.

        Raises PermissionError (EACCES) also if the region holds a protection that the access mode
        does not include, such as ``rw-`` with ``writable=False``.
        """
        mode = os.O_RDWR if writable else os.O_RDONLY
        return cls(os.open(path, mode | os.O_CLOEXEC), path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<Region {self.path} ({state})>"

    def close(self) -> None:
        """Close the descriptor. Does nothing the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def fd(self) -> int:
        """The descriptor, for calls of one's own. Raises ValueError once closed."""
        if self._fd < 0:
            raise ValueError(f"region {self.path} is closed")
        return self._fd

    def fileno(self) -> int:
        """As :attr:`fd`, so that a region can be given where a file is wanted."""
        return self.fd

    @property
    def size(self) -> int:
        """Bytes; 0 before it is set."""
        with _about(self.path):
            return os.fstat(self.fd).st_size

    def resize(self, size: int) -> None:
        """ftruncate(2): what lay behind the new end is gone."""
        with _about(self.path):
            os.ftruncate(self.fd, size)

    def map(
        self,
        offset: int,
        size: int,
        prot: AnyProt,
        *,
        fd: int | None = None,
        object: AnyPath | None = None,  # noqa: A002 - it is what the interface calls it
        object_offset: int = 0,
        replace: bool = True,
        huge: bool = False,
    ) -> None:
        """Put memory at ``offset``, or the file ``object`` (or ``fd``) from ``object_offset`` on.

        The file itself is shared, not a copy of it; a descriptor may be closed afterwards. What was
        in the range goes, or with ``replace=False`` is in the way: FileExistsError. Raises OSError:
        EBUSY if someone has the region open or mapped with fewer rights, EINVAL for what is no
        regular file, EOPNOTSUPP for a file on a mount without Feature.FILE_OBJECTS, and what
        mmap(2) says of that file. ``huge``: ask for huge pages, for memory alone (EINVAL);
        EOPNOTSUPP on a mount without Feature.HUGE.
        """
        rights = parse_prot(prot)
        if object is not None:
            if fd is not None:
                raise TypeError("give the object as a path or as a descriptor, not both")
            opened = open_object(object, rights)
            try:
                self.map(
                    offset,
                    size,
                    rights,
                    fd=opened,
                    object_offset=object_offset,
                    replace=replace,
                    huge=huge,
                )
            finally:
                os.close(opened)
            return
        flags = MapFlag.SHARED | MapFlag.FIXED
        if not replace:
            flags |= MapFlag.FIXED_NOREPLACE
        if huge:
            flags |= MapFlag.HUGETLB
        if fd is None:
            flags |= MapFlag.ANONYMOUS
            fd = 0xFFFFFFFF
        self.ioctl(
            Command.CREATE_MAPPING,
            CreateArgs(offset, size, object_offset, int(rights), int(flags), fd),
        )

    def unmap(self, offset: int, size: int) -> None:
        """Take a range out and free its memory. Holes in it are fine."""
        self.ioctl(Command.UNMAP, UnmapArgs(offset, size))

    def protect(self, offset: int, size: int, prot: AnyProt) -> None:
        """Set the protection of a range, for every process at once.

        Raises OSError: ENOMEM if a part is not mapped, EBUSY if someone has the region open or
        mapped with fewer rights. Nothing has changed then.
        """
        self.ioctl(Command.PROTECT, ProtectArgs(offset, size, int(parse_prot(prot))))

    def query(self, offset: int, *, next: bool = False) -> Mapping | None:  # noqa: A002
        """The mapping that covers ``offset``, or with ``next`` the first one at or after it."""
        flags = QueryFlag.NEXT if next else QueryFlag.COVERING
        try:
            found = self.ioctl(Command.QUERY, QueryArgs(offset, int(flags)))
        except FileNotFoundError:
            return None
        return Mapping(
            start=found.start,
            size=found.size,
            prot=Prot(found.prot),
            kind=Kind(found.kind),
            huge=bool(found.map_flags & MapFlag.HUGETLB),
            object_offset=found.object_offset,
            object_dev=(found.object_dev_major, found.object_dev_minor),
            object_ino=found.object_ino,
        )

    def __iter__(self) -> Iterator[Mapping]:
        """The mappings by offset, each as it is when its turn comes."""
        offset, end = 0, self.size
        while offset < end:
            found = self.query(offset, next=True)
            if found is None:
                return
            yield found
            offset = found.end

    def notify(
        self,
        offset: int,
        size: int,
        events: NotifyEvent = NotifyEvent.WRITE,
        *,
        mode: NotifyMode = NotifyMode.LOG,
        signo: int = 0,
        timeout_ms: int = 0,
        on_timeout: OnTimeout = OnTimeout.DENY,
        scan: bool = False,
    ) -> None:
        """Watch a range; ``NotifyEvent.DISARM`` ends it. EOPNOTSUPP without Feature.NOTIFY.

        ``scan``: stores, in mode LOG, are noted by the kernel and told of a moment later.
        """
        flags = NotifyFlag.SCAN if scan else 0
        numbers = (int(events), int(mode), signo, timeout_ms, int(on_timeout), flags)
        self.ioctl(Command.NOTIFY, NotifyArgs(offset, size, *numbers))

    def sync(self, offset: int = 0, size: int | None = None) -> None:
        """Write a range's file objects to their storage. EOPNOTSUPP without Feature.FILE_OBJECTS.

        Without ``size``: to the end of the region. All are tried; raises OSError with what
        fsync(2) said of the first that failed (EIO, ENOSPC, EDQUOT ...).
        """
        rest = -(-(self.size - offset) // PAGE_SIZE) * PAGE_SIZE
        length = max(rest, 0) if size is None else size
        self.ioctl(Command.SYNC, SyncArgs(offset, length))

    def info(self) -> Info:
        """What the mount is, and the region's size."""
        return _info(self.ioctl(Command.INFO, InfoArgs()))

    def ioctl(self, command: Command, args: _Args) -> _Args:
        """Any command, as it is: the struct that the server gave back."""
        buffer = bytearray(args.pack())
        with _about(self.path):
            fcntl.ioctl(self.fd, command, buffer)
        return type(args).unpack(bytes(buffer))

    def mmap(
        self, offset: int = 0, length: int | None = None, prot: AnyProt | None = None
    ) -> mmap.mmap:
        """Map a part of the region, without ``length`` to its end, into this process.

        The protection must include every one that is inside the region. Left out, it is exactly
        what is inside; of a region that holds nothing yet, what the descriptor allows. The map
        holds a descriptor of its own: it outlives this object, until it is closed.

        Raises PermissionError (EACCES) if the protection is not enough, ValueError for a range
        that is empty or reaches past the end.
        """
        size = self.size
        length = size - offset if length is None else length
        if offset < 0 or length <= 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset:#x} are not within {size} bytes")
        rights = self._rights_to_map() if prot is None else parse_prot(prot)
        with _about(self.path):
            return mmap.mmap(
                self.fd, length, flags=mmap.MAP_SHARED, prot=int(rights), offset=offset
            )

    def _rights_to_map(self) -> Prot:
        inside = union(list(self))
        if inside:
            return inside
        mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        return Prot.READ if mode == os.O_RDONLY else Prot.READ | Prot.WRITE


def _info(args: InfoArgs) -> Info:
    return Info(
        abi_version=args.abi_version,
        gate=Gate(args.gate),
        features=Feature(args.features),
        alignment=args.alignment,
        page_size=args.page_size,
        region_size=args.region_size,
    )


# -- mounts


@attrs.frozen
class RegionFile:
    """A region of a mount by its name (the path below the mount), without opening it."""

    mount: Mount
    name: str

    @property
    def path(self) -> str:
        return os.path.join(self.mount.path, self.name)  # noqa: PTH118 - a string is wanted

    @property
    def control(self) -> Path:
        """The directory with its control files: ``events``, ``maps``, ``clients``, ``stats``."""
        return Path(self.mount.path, CONTROL, self.name)

    def open(self, *, writable: bool = True) -> Region:
        """As :meth:`Region.open`."""
        return Region.open(self.path, writable=writable)

    def stat(self) -> os.stat_result:
        return os.stat(self.path)  # noqa: PTH116 - as path

    def mappings(self) -> list[Mapping]:
        """From ``maps``: one read instead of a query each, and no need to open the region."""
        return parse_maps(os.fsdecode((self.control / "maps").read_bytes()))

    def stats(self) -> dict[str, int]:
        """From ``stats``."""
        lines = (self.control / "stats").read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}

    def clients(self) -> set[int]:
        """The processes that map it, from ``clients``."""
        return {client.pid for client in self.client_mappings()}

    def client_mappings(self) -> list[ClientMapping]:
        """Each mapping of it in each process, from ``clients``."""
        return parse_clients(os.fsdecode((self.control / "clients").read_bytes()))

    def decide(self, seq: int, *, allow: bool) -> None:
        """Let an access go that is held, or deny it. ``seq`` is that of its ``hold`` event.

        Raises FileNotFoundError if nothing is held under that number (any more).
        """
        _decide(self.control / "events", seq, allow=allow)

    def events(self, *, timeout: float | None = None, history: bool = False) -> EventStream:
        """As :func:`events`."""
        return events(self.control / "events", timeout=timeout, history=history)


_MAPS_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<prot>[-rwx]{3})[sp] (?P<offset>[0-9a-f]+)"
    r" (?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<ino>[0-9]+)"
    r" (?P<kind>anon|huge|file|shmem)(?: (?P<path>.*))?",
    re.DOTALL,
)
_OCTAL = re.compile(r"\\([0-7]{3})")
"""How a control file writes what would break its lines, as in proc_pid_mounts(5)."""


def parse_maps(text: str) -> list[Mapping]:
    """The lines of a ``maps`` file. Raises ValueError for a line that is none."""
    return [_parse_maps_line(line) for line in _lines(text)]


def _parse_maps_line(line: str) -> Mapping:
    found = _MAPS_LINE.fullmatch(line)
    if found is None:
        raise ValueError(f"not a line of a maps file: {line!r}")
    start, end, offset, major, minor = (
        int(found[key], 16) for key in ("start", "end", "offset", "major", "minor")
    )
    return Mapping(
        start=start,
        size=end - start,
        prot=Prot.parse(found["prot"]),
        kind=Kind.ANON if found["kind"] in {"anon", "huge"} else Kind.FILE,
        huge=found["kind"] == "huge",
        object_offset=offset,
        object_dev=(major, minor),
        object_ino=int(found["ino"]),
        object_path=found["path"] and _unescaped(found["path"]),
        object_shmem=None if found["kind"] == "anon" else found["kind"] == "shmem",
    )


def _lines(text: str) -> list[str]:
    """As they are: str.splitlines() takes more than a newline for the end of a line."""
    return text.removesuffix("\n").split("\n") if text else []


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda code: chr(int(code[1], 8)), text)


@attrs.frozen
class ClientMapping:
    """``[start, end)`` of a process's address space shows the region from ``offset``. Bytes.

    ``prot`` is what that mapping allows as the system sees it. ``state``: ``replica`` (it is what
    the region's table says), ``fault`` (parts of it are enforced by faults), ``unenforced`` and
    then ``why``. ``armed`` ranges are caught in the process, ``faults`` accesses have been.
    """

    pid: int
    start: int
    end: int
    prot: Prot
    offset: int
    state: str
    why: str
    armed: int
    faults: int
    comm: str


def parse_clients(text: str) -> list[ClientMapping]:
    """The lines of a ``clients`` file. Raises ValueError for a line that is none."""
    found: list[ClientMapping] = []
    for line in _lines(text):
        pid, addresses, prot, offset, state, armed, faults, comm = line.split(" ", 7)
        start, end = addresses.split("-")
        name, _, why = state.partition(":")
        found.append(
            ClientMapping(
                int(pid),
                int(start, 16),
                int(end, 16),
                Prot.parse(prot[:3]),
                int(offset, 16),
                name,
                _unescaped(why),
                int(armed),
                int(faults),
                _unescaped(comm),
            )
        )
    return found


def _decide(path: AnyPath, seq: int, *, allow: bool) -> None:
    word = b"allow" if allow else b"deny"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        with _about(os.fspath(path)):
            os.write(fd, b"%s %d\n" % (word, seq))
    finally:
        os.close(fd)


@attrs.frozen
class Mount:
    """A mount of msharefs: where, and the name it was given (``source``, as in df(1))."""

    path: str
    source: str

    def info(self) -> Info:
        """What the mount is. Raises OSError: ENOTCONN if its server has died."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with Region(fd, self.path) as directory:
            return directory.info()

    def region(self, name: str) -> RegionFile:
        """The region of that name, whether it exists or not."""
        return RegionFile(self, name)

    def regions(self, directory: str = "") -> Iterator[RegionFile]:
        """All regions in a directory of the mount and in those below it, by name.

        Those that lie too deep for a path (PATH_MAX, 4,096 bytes) are left out.
        """
        with os.scandir(os.path.join(self.path, directory)) as found:  # noqa: PTH118
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = os.path.join(directory, entry.name)  # noqa: PTH118
            longest = os.path.join(self.path, CONTROL, name, "clients")  # noqa: PTH118
            if len(os.fsencode(longest)) >= _PATH_MAX:
                continue
            if entry.is_dir(follow_symlinks=False):
                if name not in _OWN_NAMES:
                    # Gone between the listing and now, or closed to us: not there for us.
                    with suppress(FileNotFoundError, PermissionError):
                        yield from self.regions(name)
            elif name not in _OWN_NAMES:
                yield RegionFile(self, name)

    def events(self, *, timeout: float | None = None, history: bool = False) -> EventStream:
        """Every region's events; for the mount's owner. As :func:`events`."""
        return events(
            os.path.join(self.path, CONTROL, "events"),  # noqa: PTH118
            timeout=timeout,
            history=history,
        )


def mounts() -> list[Mount]:
    """The msharefs mounts that this process sees, in the order in which they were made."""
    return [mount for fstype, mount in _mount_table() if fstype == FSTYPE]


def connect(mountpoint: AnyPath | None = None) -> Mount:
    """The mount at ``mountpoint``, or the only one there is.

    Raises NotAMount if there is none, SeveralMounts if ``mountpoint`` is needed to choose one.
    """
    found = mounts()
    if mountpoint is not None:
        wanted = os.path.realpath(mountpoint)
        for mount in reversed(found):
            if mount.path == wanted:
                return mount
        raise NotAMount(ENOENT, "no msharefs is mounted there", os.fspath(mountpoint))
    if not found:
        raise NotAMount(ENOENT, "no msharefs is mounted (mshare mount DIR)")
    if len(found) > 1:
        paths = ", ".join(mount.path for mount in found)
        raise SeveralMounts(ENOTUNIQ, f"several mounts ({paths}): say which by a path")
    return found[0]


def locate(path: AnyPath) -> tuple[Mount, str]:
    """The mount that ``path`` (existing or not) is on, and its name there: "" for the root.

    Raises NotAMount if it is on none.
    """
    real = os.path.realpath(path)
    best: tuple[str, Mount] | None = None
    for fstype, mount in _mount_table():
        at = mount.path.rstrip("/")
        below = real == mount.path or real.startswith(at + "/")
        if below and (best is None or len(mount.path) >= len(best[1].path)):
            best = fstype, mount
    if best is None or best[0] != FSTYPE:
        raise NotAMount(ENOENT, "is not on a mount of msharefs", os.fspath(path))
    return best[1], real[len(best[1].path.rstrip("/")) + 1 :]


def _mount_table() -> Iterator[tuple[str, Mount]]:
    """File system type and mount of each line of proc_pid_mountinfo(5)."""
    with _MOUNT_TABLE.open("rb") as table:
        for line in table:
            left, _, right = line.rstrip(b"\n").partition(b" - ")
            fstype, source = map(_unescape, right.split(b" ")[:2])
            yield fstype, Mount(_unescape(left.split(b" ")[4]), source)


def _unescape(field: bytes) -> str:
    plain = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8) & 0xFF]), field)
    return os.fsdecode(plain)


# -- events


def events(path: AnyPath, *, timeout: float | None = None, history: bool = False) -> EventStream:
    """The events of a ``.control/**/events`` file from now on, as an iterator of dicts.

    With ``history``, those first that the server still holds. Ends after ``timeout`` seconds if
    that is given. An event named ``overflow`` says how many were ``lost`` because this reader was
    too slow.

    >>> for event in events("/run/mshare/.control/events", timeout=10):  # doctest: +SKIP
    ...     print(event["event"], event["region"])
    """
    return EventStream(path, timeout=timeout, history=history)


class EventStream:
    """Events of one control file. A context manager; also an iterator. ``fileno`` can be polled."""

    def __init__(
        self, path: AnyPath, *, timeout: float | None = None, history: bool = False
    ) -> None:
        self.path: Final = os.fspath(path)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._buffer = b""
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        if not history:
            self._skip_until(time.time())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        return self._fd

    def __iter__(self) -> Iterator[Event]:
        for line in self.lines():
            yield json.loads(line)

    def lines(self, *, wait: bool = True) -> Iterator[bytes]:
        """The events as they come: a JSON object and a newline each.

        Without ``wait`` it ends when nothing is there at the moment.
        """
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                yield line + newline
                continue
            data = self._read()
            if data is None and (not wait or not self._wait()):
                return
            if data == b"":  # the server closed the stream
                return
            self._buffer += data or b""

    def _read(self) -> bytes | None:
        """None if nothing is there."""
        try:
            with _about(self.path):
                return os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return None

    def _wait(self) -> bool:
        """False when the time is over."""
        if self._deadline is None:
            self._poll.poll()
            return True
        left = self._deadline - time.monotonic()
        return left > 0 and bool(self._poll.poll(left * 1000))

    def _skip_until(self, now: float) -> None:
        """Events that come while we read do not keep us: the first one after ``now`` is kept."""
        for line in self.lines(wait=False):
            if json.loads(line)["time"] >= now:
                self._buffer = line + self._buffer
                return
