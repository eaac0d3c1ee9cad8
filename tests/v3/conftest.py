"""A mount that behaves as the kernel's v3 series, and calls on its files that return an errno."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from msharefs.abi import CreateArgs, MapFlag, UnmapArgs
from tests.conftest import serving
from tests.v3.actors import Actor, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Served

ALIGNMENT = 512 << 30
PAGE = 4096
ANON = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
CREATE_MAPPING, UNMAP = 0x40287800, 0x40107801

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def name_of(code: int) -> str:
    return errno.errorcode[code] if code else ""


def ioctl(fd: int, number: int, data: bytes | int = 0) -> str:
    """The name of the errno; empty if there is none."""
    argument = ctypes.create_string_buffer(data, len(data)) if isinstance(data, bytes) else data
    failed = libc.ioctl(fd, ctypes.c_ulong(number), argument)
    return name_of(ctypes.get_errno()) if failed else ""


def create_mapping(
    fd: int, offset: int, size: int, prot: int = 3, flags: int = ANON, *, obj: int = 0, at: int = 0
) -> str:
    return ioctl(fd, CREATE_MAPPING, CreateArgs(offset, size, at, prot, flags, obj).pack())


def unmap(fd: int, offset: int, size: int) -> str:
    return ioctl(fd, UNMAP, UnmapArgs(offset, size).pack())


def fallocate(fd: int, mode: int, offset: int, length: int) -> str:
    return name_of(ctypes.get_errno()) if libc.fallocate(fd, mode, offset, length) else ""


def attempt(call: Callable[..., object], *arguments: object) -> str:
    """The name of the errno of a function of ``os``; empty if there is none."""
    try:
        call(*arguments)
    except OSError as error:
        return name_of(error.errno or 0)
    return ""


@pytest.fixture(scope="module")
def mounts(tmp_path_factory) -> Iterator[Callable[[str], Served]]:
    """Mounts by their options, each started once for all tests of a module."""
    started: dict[str, Served] = {}
    with serving(tmp_path_factory.mktemp("mounts")) as start:

        def get(options: str) -> Served:
            if options not in started:
                started[options] = start(options)
            return started[options]

        yield get


@pytest.fixture
def strict(mounts) -> Served:
    return mounts("strict=v3")


@pytest.fixture
def fresh(strict) -> Iterator[Callable[..., int]]:
    """Make a region, unsized or not, and open it; it is gone at the end."""
    opened: list[int] = []
    path = strict.path / "region"

    def make(size: int | None = ALIGNMENT, flags: int = os.O_RDWR) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        opened.append(fd)
        if size is not None:
            os.ftruncate(fd, size)
        if flags != os.O_RDWR:
            opened.append(os.open(path, flags))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)
    path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def actor_program(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("actor"))


@pytest.fixture
def actors(actor_program) -> Iterator[Callable[[], Actor]]:
    """Start processes that do as they are told; they have ended at the end."""
    started: list[Actor] = []

    def start() -> Actor:
        started.append(Actor.start(actor_program))
        return started[-1]

    yield start
    for actor in started:
        actor.close()


@pytest.fixture
def actor(actors) -> Actor:
    return actors()
