"""How a mount is started by others: systemd and mount(8)."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from msharefs.service.mounts import MountError, unmount


def test_the_service_manager_hears_when_the_mount_is_ready(start_mount, tmp_path, monkeypatch):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        mount = start_mount()
        assert b"READY=1" in manager.recv(4096).splitlines()
        assert (mount.path / "mshare_info").exists()
        mount.stop()
        assert manager.recv(4096) == b"STOPPING=1"


def test_mount_8_starts_it_and_umount_8_ends_it(start_mount, tmp_path):
    """By way of mount.fuse3, which mount(8) calls for the type fuse.msharefs."""
    place = tmp_path / "by_mount"
    place.mkdir()
    path = f"{Path(sys.executable).parent}:/usr/sbin:/sbin:{os.environ['PATH']}"
    command = ["mount.fuse3", "none", str(place), "-t", "fuse.msharefs", "-o", "rw,size=1M"]
    try:
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        assert os.statvfs(place).f_blocks == 256
        subprocess.run(["umount", str(place)], check=True)
        assert not (place / "mshare_info").exists()
    finally:
        with contextlib.suppress(MountError):
            unmount(place, detach=True)


def test_a_mount_point_that_cannot_be_used_is_one_line(start_mount, mount):
    for place, words in ((mount.path, "busy"), (mount.path / "none", "does not exist")):
        done = subprocess.run(
            [sys.executable, "-m", "msharefs.cli.server", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["size=1M", "huge=always"])
def test_options_that_need_a_tmpfs_leave_no_mount_behind(start_mount, option):
    before = Path("/proc/self/mountinfo").read_text().count(" - tmpfs ")
    start_mount(option)
    assert Path("/proc/self/mountinfo").read_text().count(" - tmpfs ") == before
