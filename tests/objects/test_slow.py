"""A file whose filesystem does not answer, or fails, is the affair of those who use that file."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from msharefs.client import Region
from tests.objects.conftest import PAGE, mapped_kinds, refused


@pytest.fixture
def shown(region, slow):
    """A region whose first four pages are the slow file's, and the next four memory."""
    slow.tell(f"fill {4 * PAGE} s")
    region.map(0, 4 * PAGE, "rw-", object=slow.object)
    region.map(4 * PAGE, 4 * PAGE, "rw-")
    return region


@pytest.fixture(autouse=True)
def _let_go(mount, slow):
    """After each test: the server must have let go of the file when its region is gone."""
    yield
    slow.tell("go")
    os.unlink(mount.path / "r")
    mount.until(lambda: not hold(mount, slow), "the file is let go")


def hold(mount, slow):
    """How many descriptors of the slow file the server has, without asking that filesystem."""
    names = f"/proc/{mount.process.pid}/fd"
    found = 0
    for name in os.listdir(names):
        try:
            found += os.readlink(f"{names}/{name}") == str(slow.object)
        except FileNotFoundError:
            continue
    return found


def others_go_on(region):
    """What does not concern the file is as quick as ever."""
    assert os.pwrite(region.fd, b"on", 5 * PAGE) == 2
    assert os.pread(region.fd, 2, 5 * PAGE) == b"on"
    region.protect(6 * PAGE, PAGE, "r--")
    region.protect(6 * PAGE, PAGE, "rw-")


@pytest.mark.parametrize("op", ["getattr", "open"])
def test_a_caller_killed_in_the_ioctl_leaves_nothing_behind(mount, region, slow, program, op):
    region.map(4 * PAGE, 4 * PAGE, "rw-")
    code = f"fd = os.open({str(slow.object)!r}, os.O_RDWR)\nprint('open', flush=True)\n"
    client = program(
        mount.path / "r", code + "sys.stdin.read(1)\nregion.map(0, 4096, 'rw-', fd=fd)"
    )
    assert client.stdout.readline() == "open\n"
    slow.tell(f"hang {op}")
    client.stdin.close()
    assert slow.hear() == f"waits {op}"
    others_go_on(region)
    client.kill()
    assert client.wait(60) == -signal.SIGKILL
    assert region.query(0) is None
    assert slow.tell("go") == "ok"
    assert region.query(0) is None


@pytest.mark.parametrize("call", ["os.pread(region.fd, 9, 0)", "os.pwrite(region.fd, b'w' * 9, 0)"])
def test_no_signal_ends_a_call_on_a_file(mount, shown, slow, program, call):
    """As for read() and write() of any regular file; the handler runs after it."""
    op = "read" if "pread" in call else "write"
    slow.tell(f"hang {op}")
    code = "signal.signal(signal.SIGUSR1, lambda *_: print('signal', flush=True))\n"
    client = program(mount.path / "r", f"{code}print('now', flush=True)\nprint({call}, flush=True)")
    assert client.stdout.readline() == "now\n"
    assert slow.hear() == f"waits {op}"
    others_go_on(shown)
    client.send_signal(signal.SIGUSR1)
    others_go_on(shown)
    assert slow.tell("go") == "ok"
    assert sorted(client.communicate(timeout=60)[0].splitlines()) == sorted(
        ["signal", "b'sssssssss'" if op == "read" else "9"]
    )


@pytest.mark.parametrize("op", ["read", "write", "fsync"])
def test_a_client_killed_in_a_call_on_a_file_is_gone(mount, shown, slow, program, op):
    slow.tell(f"hang {op}")
    call = {"read": "pread(region.fd, 9, 0)", "write": "pwrite(region.fd, b'w', 0)"}
    client = program(mount.path / "r", f"os.{call.get(op, 'fsync(region.fd)')}")
    assert slow.hear() == f"waits {op}"
    client.kill()
    assert client.wait(60) == -signal.SIGKILL
    others_go_on(shown)


def test_a_change_waits_for_the_stores_that_it_forbids(mount, shown, slow, program):
    slow.tell("hang write")
    client = program(
        mount.path / "r",
        "print(os.pwrite(region.fd, b'late', PAGE), flush=True)".replace("PAGE", str(PAGE)),
    )
    assert slow.hear() == "waits write"
    shown.protect(2 * PAGE, PAGE, "r--")  # not where the store goes
    before = mapped_kinds(shown)
    for change in (
        lambda: shown.protect(PAGE, PAGE, "r--"),
        lambda: shown.unmap(PAGE, PAGE),
        lambda: shown.map(0, 4 * PAGE, "rw-"),
    ):
        refused(errno.ETIMEDOUT, change)
        assert mapped_kinds(shown) == before
    assert slow.tell("go") == "ok"
    shown.protect(PAGE, PAGE, "r--")
    assert client.communicate(timeout=60)[0] == "4\n"
    assert os.pread(shown.fd, 4, PAGE) == b"late"
    refused(errno.EACCES, os.pwrite, shown.fd, b"more", PAGE)


def test_what_the_filesystem_refuses_is_the_callers_to_hear(shown, slow):
    slow.tell(f"fail write {errno.EDQUOT}")
    refused(errno.EDQUOT, os.pwrite, shown.fd, b"x", 0)
    shown.map(0, PAGE, "rw-")
    assert os.pwrite(shown.fd, b"x" * 2 * PAGE, 0) == PAGE  # what went well before it
    slow.tell(f"fail read {errno.ESTALE}")
    refused(errno.ESTALE, os.pread, shown.fd, 10, PAGE)
    assert os.pread(shown.fd, 2 * PAGE, 0) == b"x" * PAGE
    slow.tell("well")
    assert os.pread(shown.fd, 2, PAGE) == b"ss"


def test_each_descriptor_hears_once_of_a_failed_sync(mount, shown, slow):
    with Region.open(mount.path / "r") as other:
        slow.tell(f"fail fsync {errno.EIO}")
        refused(errno.EIO, os.fsync, shown.fd)
        slow.tell("well")
        os.fsync(shown.fd)
        refused(errno.EIO, other.sync, 0, PAGE)  # though the filesystem is well again
        other.sync()
        slow.tell(f"fail fsync {errno.ENOSPC}")
        refused(errno.ENOSPC, other.sync)
        other.sync(4 * PAGE, 4 * PAGE)  # where no file lies
        slow.tell("well")
        with Region.open(mount.path / "r") as late:
            os.fdatasync(late.fd)  # it was not open then
        refused(errno.ENOSPC, os.fdatasync, shown.fd)
        os.fdatasync(shown.fd)
