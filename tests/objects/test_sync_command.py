"""``mshare sync`` of a file whose storage is slow, or fails."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tests.objects.conftest import PAGE

PATIENCE = 60


@pytest.fixture
def sync(mount, region, slow):
    """The command, for a region with the slow file in it."""
    slow.tell(f"fill {4 * PAGE} s")
    region.map(0, 4 * PAGE, "rw-", object=slow.object)
    yield [sys.executable, "-m", "msharefs.cli.main", "sync", str(mount.path / "r")]
    region.unmap(0, 4 * PAGE)


def until_said(terminal, words):
    """What has come from a terminal when ``words`` have."""
    said, deadline = b"", time.monotonic() + PATIENCE
    while words not in said:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], said
        said += os.read(terminal, 1 << 16)
    return said


def test_somebody_at_a_terminal_is_told_what_it_waits_for(sync, slow):
    ours, theirs = pty.openpty()
    try:
        slow.tell("hang fsync")
        command = subprocess.Popen(sync, stderr=theirs, stdout=subprocess.PIPE)
        try:
            assert slow.hear() == "waits fsync"
            until_said(ours, b"writing the files in r to storage")
            until_said(ours, b"0:00:0")
            slow.tell("go")
            assert command.wait(PATIENCE) == 0
        finally:
            command.kill()
            assert command.communicate()[0] == b""
    finally:
        os.close(ours)
        os.close(theirs)


def test_its_error_is_the_storages(sync, slow):
    slow.tell("fail fsync 5")
    done = subprocess.run(sync, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"mshare: sync r: EIO: fsync of {slow.object}: Input/output error\n"
    slow.tell("well")
    done = subprocess.run(sync, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
