"""Files to lay into regions, each on the filesystem it is asked for on."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from msharefs.client import Region

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Served

PAGE = 4096
MIB = 1 << 20


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(place: Path, *options: str | Path) -> Iterator[Path]:
    """mount(8) with ``options``, unmounted at the end: nothing may keep it busy by then."""
    place.mkdir(exist_ok=True)
    run("mount", *options, place)
    try:
        yield place
    finally:
        run("umount", place)


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[str]:
    device = run("losetup", "--find", "--show", image)
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def on_loop(directory: Path, fstype: str, size: int, *options: str) -> Iterator[Path]:
    """A filesystem of ``size`` bytes in a file. Skips naming what is missing."""
    if shutil.which(f"mkfs.{fstype}") is None:
        pytest.skip(f"mkfs.{fstype} is missing")
    image = directory / f"{fstype}.img"
    with image.open("wb") as file:
        file.truncate(size)
    with loop_device(image) as device:
        quiet = ["-q"] if fstype != "vfat" else []
        run(f"mkfs.{fstype}", *quiet, device)
        with mounted(directory / fstype, *options, device):
            yield directory / fstype


@pytest.fixture
def region(mount) -> Iterator[Region]:
    """16 pages with nothing in them."""
    with Region.create(mount.path / "r", 16 * PAGE) as made:
        yield made


def mapped_kinds(region: Region) -> list[tuple[int, int, str, int]]:
    """Start, size, protection and kind of each mapping."""
    return [(m.start, m.size, m.prot.text(), int(m.kind)) for m in region]


def held(mount: Served, fd: int) -> int:
    """How many descriptors of the file behind ``fd`` the server has."""
    wanted, count = os.fstat(fd), 0
    directory = f"/proc/{mount.process.pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            found = os.stat(f"{directory}/{name}")
            count += (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
    return count


@pytest.fixture
def memfd() -> Iterator[int]:
    """A memfd of 8 pages, each full of its own number."""
    fd = os.memfd_create("object")
    os.write(fd, b"".join(bytes([page]) * PAGE for page in range(8)))
    yield fd
    os.close(fd)
