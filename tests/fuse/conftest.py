"""Real mounts of the small file system in toyfs.py, each a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import attrs
import pytest

from msharefs.fuse import find_mounts, unmount
from msharefs.fuse.mount import MountError

HERE = Path(__file__).parent
PATIENCE = 30
STATS = 0x98005407
PASSTHROUGH = 1 << 37


def missing_for_mounts() -> str | None:
    if not Path("/dev/fuse").exists():
        return "/dev/fuse is missing (modprobe fuse)"
    if os.geteuid() != 0:
        return "mounting needs root"
    return None


@attrs.define
class ToyMount:
    """A mounted toyfs. ``path`` is the mount point, ``process`` its server."""

    path: Path
    process: subprocess.Popen[str]
    log: Path
    report: dict = attrs.Factory(dict)

    def stats(self) -> dict:
        """What the server has counted so far; asked by an ioctl on the root directory."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            answer = bytearray(6144)
            fcntl.ioctl(fd, STATS, answer)
            return json.loads(bytes(answer))
        finally:
            os.close(fd)

    def wait_until(self, reached) -> dict:
        """Poll the server's counters until they satisfy ``reached``."""
        while True:
            stats = self.stats()
            if reached(stats):
                return stats

    def mounted(self) -> bool:
        return any(found.mountpoint == str(self.path) for found in find_mounts("fuse.msharefs"))

    def wait(self) -> dict:
        """Wait for the server's end and return its last report."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        self.report = json.loads(out.splitlines()[-1])
        return self.report

    def stop(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


def start(path: Path, log: Path) -> ToyMount:
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "toyfs.py"), str(path)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    return ToyMount(path, process, log)


@pytest.fixture(autouse=True)
def _programs_find_the_package(monkeypatch):
    """The programs that a test starts import the checkout that is tested."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent.parent))


@pytest.fixture
def toy(tmp_path):
    """A mounted toyfs, which the test may end itself; its end is checked in any case."""
    if missing := missing_for_mounts():
        pytest.skip(missing)
    path = tmp_path / "mnt"
    path.mkdir()
    one = start(path, tmp_path / "log")
    # A hang in the kernel cannot be interrupted from here; the end of the server frees it.
    watchdog = threading.Timer(2 * PATIENCE, one.process.kill)
    watchdog.start()
    try:
        assert "ready" in json.loads(one.process.stdout.readline() or "{}"), one.log.read_text()
        yield one
        if not one.report:
            one.stop()
        assert one.report["leaked"] == [], one.log.read_text()
        assert one.report["threads"] == ["MainThread"]
        assert not one.mounted()
        assert one.process.returncode == one.report["ended"]
    finally:
        watchdog.cancel()
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        while one.mounted():
            try:
                unmount(path, detach=True)
            except MountError:
                break


@pytest.fixture
def passthrough(toy):
    if not toy.stats()["offered"] & PASSTHROUGH:
        pytest.skip("the kernel offers no FUSE passthrough")
    return toy
