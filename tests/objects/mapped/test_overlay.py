"""Files of overlayfs, which puts a file of its own into each mapping: all that holds of other files."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.enforcement.clients import PAGE, until
from tests.objects.conftest import mounted, overlay, refused
from tests.objects.mapped.conftest import text
from tests.objects.mapped.test_changes import *  # noqa: F403 - the same tests, with other files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MNT_EXPIRE = 4
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def merged(tmp_path) -> Iterator[Path]:
    """An overlay; nothing keeps it busy soon after the regions of a test have gone."""
    place = tmp_path / "merged"
    with overlay(tmp_path):
        yield place
        until(lambda: not busy(place), "everything of the overlay to be let go of")


def busy(place: Path) -> bool:
    """Whether anything of a mount is open or mapped. Source: umount2(2), MNT_EXPIRE."""
    assert libc.umount2(os.fsencode(place), MNT_EXPIRE) == -1
    code = ctypes.get_errno()
    assert code in {errno.EAGAIN, errno.EBUSY}, os.strerror(code)
    return code == errno.EBUSY


@pytest.fixture
def make(merged) -> Iterator[Callable[..., int]]:
    """As for other files, all of them in the upper layer."""
    made: list[int] = []

    def new(first: str = "a", pages: int = 8, kind: str = "disk") -> int:
        fd = os.open(merged / f"{kind}{len(made)}", os.O_RDWR | os.O_CREAT, 0o600)
        made.append(fd)
        os.write(fd, b"".join(bytes([ord(first) + page]) * PAGE for page in range(pages)))
        return fd

    yield new
    for fd in made:
        os.close(fd)


def test_a_file_of_the_lower_layer_stays_there(share, merged, tmp_path):
    """Laid in read-only it is not copied up, and it comes and goes as any other."""
    region = share.region(8)
    client = share.mapped(region, pages=8)
    fd = os.open(merged / "object", os.O_RDONLY)
    region.map(2 * PAGE, 2 * PAGE, "r--", fd=fd)
    child = share.fork(client)
    for one in (client, child):
        assert text(one, 3) == "..l"
    assert not (tmp_path / "layers/upper/object").exists()
    region.protect(2 * PAGE, PAGE, "---")
    assert client.fault_of("load", 2 * PAGE)
    region.map(2 * PAGE, 2 * PAGE, "rw-")
    for one in (client, child):
        assert text(one, 5) == "....."
    os.close(fd)


def test_on_two_overlays_it_cannot_be_passed_through(share, merged, tmp_path):
    """Said before anybody is touched; nothing is left open by the attempt."""
    region = share.region(8)
    client = share.mapped(region, pages=8)
    layers = f"lowerdir={merged}:{tmp_path}/layers/lower"
    with mounted(tmp_path / "two", "-t", "overlay", "-o", layers, "overlay") as place:
        fd = os.open(place / "object", os.O_RDONLY)
        refused(errno.ELOOP, region.map, 0, PAGE, "r--", fd=fd)
        os.close(fd)
        until(lambda: not busy(place), "the file to be let go of")
    assert text(client, 8) == "........"
