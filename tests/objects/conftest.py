"""Files to lay into regions, each on the filesystem it is asked for on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from msharefs.client import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Served

HERE = Path(__file__).parent
PAGE = 4096
MIB = 1 << 20
PATIENCE = 60


def refused(code: int, call: Callable, *arguments, **keywords) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments, **keywords)
    assert caught.value.errno == code, caught.value


def until(reached: Callable[[], bool], what: str) -> None:
    """Wait for what nobody tells of; yields the processor between looks."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        os.sched_yield()


def events_of(mount: Served, name: str) -> list[dict[str, Any]]:
    """What has happened in a region so far, oldest first."""
    fd = os.open(mount.path / ".control" / name / "events", os.O_RDONLY | os.O_NONBLOCK)
    text = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, MIB):
            text += data
    os.close(fd)
    return [json.loads(line) for line in text.splitlines()]


def reasons(mount: Served, name: str) -> list[tuple[str, str]]:
    """The errno and the reason of each refusal in a region, oldest first."""
    found = events_of(mount, name)
    return [(e["error"], e["reason"]) for e in found if e["event"] == "refuse"]


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
    except BaseException:
        run("umount", "--lazy", place)
        raise
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


@pytest.fixture
def program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python programs with ``region`` open; those that have not ended are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(region: Path, code: str) -> subprocess.Popen[str]:
        head = f"""
import errno, os, signal, sys
from msharefs.client import Region
region = Region.open({str(region)!r})
print("ready", flush=True)
"""
        process = subprocess.Popen(
            [sys.executable, "-c", head + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


@attrs.define(eq=False)
class SlowFs:
    """A filesystem of slowfs.py; ``object`` is its file."""

    place: Path
    process: subprocess.Popen[str]

    @property
    def object(self) -> Path:
        return self.place / "object"

    def tell(self, command: str) -> str:
        """Its answer; what it tells of meanwhile must have been heard."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")


@pytest.fixture
def slow(tmp_path) -> Iterator[SlowFs]:
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("mounting needs root and /dev/fuse")
    place = tmp_path / "slow"
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(HERE / "slowfs.py"), str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    one = SlowFs(place, process)
    try:
        assert one.hear() == "ready"
        yield one
        one.tell("go")
        run("umount", place)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        if os.path.ismount(place):
            run("umount", "--lazy", place)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


SIZES = {"ext4": 32 * MIB, "btrfs": 128 * MIB, "xfs": 320 * MIB}


@contextlib.contextmanager
def overlay(tmp_path):
    """The file is in the lower layer until it is opened for writing."""
    for name in ("lower", "upper", "work"):
        (tmp_path / "layers" / name).mkdir(parents=True)
    (tmp_path / "layers/lower/object").write_bytes(b"lower" * PAGE)
    layers = tmp_path / "layers"
    options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
    with mounted(tmp_path / "merged", "-t", "overlay", "-o", options, "overlay") as place:
        yield place


@pytest.fixture(params=["ext4", "btrfs", "xfs", "tmpfs", "overlay"])
def place(request, tmp_path):
    """A directory on that filesystem; that it can be unmounted is a part of the test."""
    if request.param in SIZES:
        with on_loop(tmp_path, request.param, SIZES[request.param]) as made:
            yield made
    elif request.param == "tmpfs":
        with mounted(tmp_path / "tmpfs", "-t", "tmpfs", "-o", "size=16M", "none") as made:
            yield made
    else:
        with overlay(tmp_path) as made:
            yield made


@pytest.fixture
def opened(place, mount, region):
    """A file of 8 pages, each full of its own number; let go by the server before it is over."""
    fd = os.open(place / "object", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, b"".join(bytes([page]) * PAGE for page in range(8)))
    yield fd
    region.unmap(0, 16 * PAGE)
    mount.until(lambda: not held(mount, fd), "it is let go")
    os.close(fd)


@pytest.fixture(params=["ENOSPC", "EIO"])
def failing(request, tmp_path):
    """A file on a disk, the errno that its storage will fail with, and how to make it fail."""
    code = getattr(errno, request.param)
    size = "12M" if code == errno.ENOSPC else "100M"  # the medium has no room, or loses its end
    with mounted(tmp_path / "medium", "-t", "tmpfs", "-o", f"size={size}", "none") as medium:
        image = medium / "image"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
        with loop_device(image) as device:
            run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1", "-O", "^has_journal", device)
            with mounted(tmp_path / "disk", "-o", "errors=continue", device) as disk:
                with (disk / "object").open("wb") as file:
                    file.truncate(16 * MIB)
                    if code == errno.EIO:  # it is the blocks of the file that are lost
                        file.write(bytes(16 * MIB))
                        os.fsync(file.fileno())

                def fail():
                    if code == errno.EIO:
                        os.truncate(image, 8 * MIB)
                        run("losetup", "--set-capacity", device)

                yield disk / "object", code, fail
