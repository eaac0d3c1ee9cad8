"""Mount options: what ``-o`` takes, for ``mshare mount``, ``msharefs`` and mount(8) alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

import attrs
import psutil

from msharefs.clients.policy import Enforce, Way
from msharefs.memory.tmpfs import HUGE_POLICIES
from msharefs.region.pages import page_down
from msharefs.region.semantics import AUTOMAP, MSHARE, V3, Semantics
from msharefs.service.eventlog import MOUNT_CAPACITY
from msharefs.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_IGNORED: Final = frozenset(
    [
        "rw",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "async",
        "sync",
        "dirsync",
        "defaults",
        "auto",
        "noauto",
        "user",
        "nouser",
        "users",
        "nofail",
        "_netdev",
        "owner",
        "group",
        "atime",
        "relatime",
        "norelatime",
        "strictatime",
        "diratime",
        "nodiratime",
        "lazytime",
        "nolazytime",
        "iversion",
        "mand",
        "loud",
        "silent",
        "allow_other",
        "default_permissions",
    ]
)
"""Words of mount(8) and fuse(8) that change nothing here: nosuid, nodev, allow_other and
default_permissions always hold, and reading a region never sets its atime."""


V3_ROOT_MODE: Final = 0o777
"""Anybody may remove anybody's region: the kernel series sets no sticky bit."""
GATES: Final = ("auto", "lsm", "ptrace", "none")


class OptionError(ValueError):
    """One readable line about an option that cannot be used."""


@attrs.frozen
class MountOptions:
    """``limit`` in bytes; ``root_mode`` and ownership are the root directory's."""

    source: str = "msharefs"
    limit: int | None = None
    huge: str | None = None
    root_mode: int = 0o1777
    uid: int = 0
    gid: int = 0
    events: int = MOUNT_CAPACITY
    enforce: Enforce = Enforce.BEST
    protect: Way = Way.AUTO
    log: str | None = None
    gate: str = "auto"
    log_period_ms: int = 100
    read_only: bool = False
    noexec: bool = False
    automap: bool = False
    strict: bool = False
    private: bool = False
    native: bool = False

    HELP = (
        ("size=SIZE", "limit for the memory of all regions together; ENOSPC beyond it"),
        ("huge=POLICY", f"huge pages: {', '.join(HUGE_POLICIES)} (as for tmpfs)"),
        (
            "automap",
            "plain files as on tmpfs: growing one maps memory; size= is half of all memory",
        ),
        (
            "strict=v3",
            "as version 3 of the kernel series: sizes and addresses in units of 512 GiB",
        ),
        ("io=WAY", "automap: read() and write() checked (default), or native: fast and unchecked"),
        ("private=POLICY", "MAP_PRIVATE: refuse (default) or allow; such a copy is out of reach"),
        ("mode=MODE", "mode of the root directory in octal (default 1777)"),
        ("uid=UID, gid=GID", "owner of the root directory (default root)"),
        (
            "enforce=best|strict",
            "let in and list what cannot be made to obey, or refuse it (EPERM)",
        ),
        ("protect=auto|vma|fault", "protect by mprotect in each process, or by userfaultfd"),
        ("events=N", f"events held for readers that come late (default {MOUNT_CAPACITY})"),
        ("gate=KIND", "how mmap() is supervised: auto (default), lsm, ptrace, none"),
        (
            "log_period=MS",
            "how often stores that the kernel notes are looked for (default 100; docs/ioctl.md)",
        ),
        ("log=FILE", "append the log to FILE (default: standard error, or syslog)"),
        ("ro, noexec", "as for mount(8)"),
    )

    @property
    def semantics(self) -> Semantics:
        """What the mount takes its files for."""
        kind = AUTOMAP if self.automap else V3 if self.strict else MSHARE
        return attrs.evolve(
            kind,
            private=self.private,
            native=self.native and self.automap,
            no_huge=self._no_huge(kind),
        )

    def _no_huge(self, kind: Semantics) -> str:
        if self.huge in {None, "never"}:
            return kind.no_huge
        if self.huge == "advise" and self.gate == "none":
            return "with -o gate=none nobody is asked to use them: mount with -o huge=always"
        return ""

    @property
    def memory_limit(self) -> int | None:
        """Bytes; None is no limit.

        Where nothing is reserved, one fallocate() could take all of the machine's memory. So there
        the limit is the one that tmpfs(5) has by default.
        """
        if self.limit is None and not self.semantics.reserves:
            return page_down(psutil.virtual_memory().total // 2)
        return self.limit

    @classmethod
    def parse(cls, text: str, *, source: str = "msharefs") -> Self:
        """``key=value,word,…`` as after ``-o``. Raises OptionError."""
        found: dict[str, object] = {}
        for word in filter(None, text.split(",")):
            key, has_value, value = word.partition("=")
            if key in _VALUES and has_value:
                name, convert = _VALUES[key]
                try:
                    found[name] = convert(value)
                except ValueError as error:
                    raise OptionError(f"option {key}: {error}") from None
            elif word in _WORDS:
                found[_WORDS[word]] = True
            elif word in _IGNORED or key.startswith("x-") or key in {"comment", "fsname"}:
                continue
            else:
                known = ", ".join(option for option, _ in cls.HELP)
                raise OptionError(f"unknown option {word!r} (known: {known})")
        if found.get("native") and not found.get("automap"):
            raise OptionError("io=native goes with automap only: elsewhere each access is checked")
        if found.get("strict"):
            if found.keys() & {"automap", "private", "native"}:
                raise OptionError("strict=v3 goes with none of automap, io=, private=")
            found.setdefault("root_mode", V3_ROOT_MODE)
        return cls(source=source, **found)  # type: ignore[arg-type] # each converter fits its field


def _limit(text: str) -> int:
    size = page_down(parse_size(text))
    if not size:
        raise ValueError("must be at least one page")
    return size


def _huge(text: str) -> str:
    return _one_of(text, HUGE_POLICIES)


def _enforce(text: str) -> Enforce:
    return Enforce(_one_of(text, Enforce))


def _protect(text: str) -> Way:
    return Way(_one_of(text, Way))


def _one_of(text: str, known: Iterable[str]) -> str:
    names = [*known]  # Python before 3.12 does not look for a string in an enumeration
    if text not in names:
        raise ValueError(f"{text!r} is none of {', '.join(names)}")
    return text


def _either(no: str, yes: str) -> Callable[[str], bool]:
    def convert(text: str) -> bool:
        if text not in {no, yes}:
            raise ValueError(f"{text!r} is neither {no} nor {yes}")
        return text == yes

    return convert


def _v3(text: str) -> bool:
    if text != "v3":
        raise ValueError(f"{text!r} is not v3, which is the only one")
    return True


def _gate(text: str) -> str:
    if text not in GATES:
        raise ValueError(f"{text!r} is none of {', '.join(GATES)}")
    return text


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise ValueError(f"{text!r} is not an octal mode")
    return mode


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r} is not a positive number")
    return int(text)


def _id(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32 - 1:
        raise ValueError(f"{text!r} is not a numeric user or group")
    return int(text)


def _text(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


_VALUES: Final[dict[str, tuple[str, Callable[[str], object]]]] = {
    "size": ("limit", _limit),
    "huge": ("huge", _huge),
    "private": ("private", _either("refuse", "allow")),
    "io": ("native", _either("checked", "native")),
    "strict": ("strict", _v3),
    "mode": ("root_mode", _mode),
    "uid": ("uid", _id),
    "gid": ("gid", _id),
    "events": ("events", _count),
    "enforce": ("enforce", _enforce),
    "protect": ("protect", _protect),
    "log": ("log", _text),
    "log_period": ("log_period_ms", _count),
    "gate": ("gate", _gate),
}
_WORDS: Final = {"ro": "read_only", "noexec": "noexec", "automap": "automap"}
