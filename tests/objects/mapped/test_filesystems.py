"""Files of any filesystem are seen by programs, and the filesystem can be unmounted afterwards."""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.enforcement.clients import PAGE, until
from tests.objects.conftest import MIB, held, mounted, on_loop
from tests.objects.mapped.conftest import pinned, text


@contextlib.contextmanager
def overlay(tmp_path):
    """On a tmpfs: not every filesystem can have an upper directory."""
    with mounted(tmp_path / "base", "-t", "tmpfs", "tmpfs") as base:
        for name in ("lower", "upper", "work"):
            (base / name).mkdir()
        parts = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        with mounted(tmp_path / "merged", "-t", "overlay", "-o", parts, "overlay") as merged:
            yield merged


PLACES = {
    "ext4": lambda tmp_path: on_loop(tmp_path, "ext4", 32 * MIB),
    "btrfs": lambda tmp_path: on_loop(tmp_path, "btrfs", 128 * MIB),
    "xfs": lambda tmp_path: on_loop(tmp_path, "xfs", 320 * MIB),
    "tmpfs": lambda tmp_path: mounted(tmp_path / "tmpfs", "-t", "tmpfs", "tmpfs"),
    "overlay": overlay,
}


@pytest.mark.parametrize("kind", PLACES)
def test_it_is_seen_and_let_go_of(share, tmp_path, kind):
    with PLACES[kind](tmp_path) as directory:
        fd = os.open(directory / "object", os.O_RDWR | os.O_CREAT, 0o600)
        os.write(fd, b"".join(bytes([ord("a") + page]) * PAGE for page in range(4)))
        region = share.region(8)
        client = share.mapped(region, pages=8)
        region.map(2 * PAGE, 2 * PAGE, "rw-", fd=fd, object_offset=PAGE)
        late = share.mapped(region, pages=8)
        for one in (client, late):
            assert text(one, 8) == "..bc...."
        late.store(2 * PAGE, ord("!"))
        assert os.pread(fd, 1, PAGE) == b"!"
        assert client.load(2 * PAGE) == ord("!")
        os.fsync(region.fd)
        region.unmap(0, 8 * PAGE)
        until(lambda: not (held(share.served, fd) or pinned(fd)), "the file to be let go of")
        os.close(fd)
