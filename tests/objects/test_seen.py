"""A file in a region as a program's own mapping has it: its bytes, its end, its errors."""

from __future__ import annotations

import contextlib
import errno
import os
import signal

import pytest

from msharefs.client import Region
from tests.deaths.conftest import clients, programs  # noqa: F401 - fixtures
from tests.objects.conftest import MIB, PAGE, held, on_loop, run, until

BUS = f"signal {int(signal.SIGBUS)}"
SEGV = f"signal {int(signal.SIGSEGV)}"
READ, READ_WRITE = 1, 3


def test_stores_and_writes_meet_in_the_file(mount, region, opened, clients):  # noqa: F811
    client = clients()
    region.map(8 * PAGE, 4 * PAGE, "rw-")
    client.map(mount.path / "r")
    region.map(2 * PAGE, 3 * PAGE, "rw-", fd=opened, object_offset=4 * PAGE)
    later = clients().map(mount.path / "r")
    for one in (client, later):
        assert one.load(3 * PAGE + 7) == "5"
        assert one.store(4 * PAGE, 99) == "ok"
        assert os.pread(opened, 1, 6 * PAGE) == b"c"
        os.pwrite(opened, b"\6", 6 * PAGE)
        assert one.load(4 * PAGE) == "6"
        assert one.load(5 * PAGE) == f"{SEGV} {5 * PAGE}"
        assert one.do(f"sync {2 * PAGE} {3 * PAGE}") == "ok"
    client.end()
    later.end()


def test_the_end_of_the_file_is_the_end(mount, region, opened, clients):  # noqa: F811
    """SIGBUS on whole pages past it, zeroes in the rest of its last page; wherever it is moved to."""
    os.ftruncate(opened, PAGE + 100)
    region.map(0, 4 * PAGE, "rw-", fd=opened)
    client = clients().map(mount.path / "r")
    assert client.load(PAGE + 99) == "1"
    assert client.load(PAGE + 100) == "0"
    assert client.store(2 * PAGE + 5) == f"{BUS} {2 * PAGE + 5}"
    os.ftruncate(opened, 3 * PAGE)
    assert client.load(2 * PAGE + 5) == "0"
    assert client.store(2 * PAGE + 5, 44) == "ok"
    assert os.pread(opened, 1, 2 * PAGE + 5) == bytes([44])
    assert client.load(3 * PAGE) == f"{BUS} {3 * PAGE}"
    os.ftruncate(opened, PAGE)
    assert client.load(2 * PAGE + 5) == f"{BUS} {2 * PAGE + 5}"
    assert client.load(0) == "0"
    assert os.fstat(opened).st_size == PAGE
    client.end()


def test_a_file_without_a_name_is_mapped_all_the_same(place, mount, region, opened, clients):  # noqa: F811
    region.map(0, 8 * PAGE, "rw-", fd=opened)
    client = clients().map(mount.path / "r")
    os.unlink(place / "object")
    later = clients().map(mount.path / "r")
    assert client.store(7 * PAGE, 70) == "ok"
    assert later.load(7 * PAGE) == "70"
    assert os.pread(opened, 1, 7 * PAGE) == bytes([70])
    client.end()
    later.end()


@pytest.mark.parametrize("place", ["ext4", "btrfs", "xfs", "tmpfs"], indirect=True)
def test_a_store_without_room_for_it(place, mount, region, opened, clients):  # noqa: F811
    """To a hole of a file on a full filesystem: SIGBUS, as mmap(2) has it, and no harm to others."""
    os.ftruncate(opened, 0)
    os.ftruncate(opened, 64 * MIB)
    region.resize(64 * MIB)
    region.map(0, 64 * MIB, "rw-", fd=opened)
    client = clients().map(mount.path / "r", size=64 * MIB)
    with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(MIB)):
            pass
    with contextlib.suppress(OSError), open(place / "crumbs", "wb", buffering=0) as filler:
        while filler.write(bytes(PAGE)):
            pass
    answers = [client.store(offset, 9) for offset in range(0, 64 * MIB, MIB)]
    assert f"{BUS} {63 * MIB}" == answers[-1]
    assert set(answers) <= {"ok", *(f"{BUS} {offset}" for offset in range(0, 64 * MIB, MIB))}
    # A hole needs no room to be read; in memory even that takes a page.
    nothing = f"{BUS} {63 * MIB}" if place.name == "tmpfs" else "0"
    assert client.load(63 * MIB) == nothing
    os.unlink(place / "filler")
    os.unlink(place / "crumbs")
    os.sync()

    def stored():
        return client.store(63 * MIB, 9) == "ok"

    until(stored, "room, once something was deleted")
    assert os.pread(opened, 1, 63 * MIB) == b"\t"
    client.end()
    region.unmap(0, 64 * MIB)


def test_msync_hears_of_storage_that_fails(mount, region, failing, clients):  # noqa: F811
    path, code, fail = failing
    fd = os.open(path, os.O_RDWR)
    region.resize(16 * MIB)
    region.map(0, 16 * MIB, "rw-", fd=fd)
    client = clients().map(mount.path / "r", size=16 * MIB)
    for offset in range(0, 16 * MIB, PAGE if code == errno.ENOSPC else MIB):
        answer = client.store(offset, 7)
        if answer != "ok":
            assert answer == f"{BUS} {offset}"
            break
    fail()
    assert client.do(f"sync 0 {16 * MIB}") == str(-code)
    with pytest.raises(OSError) as caught:
        os.fsync(region.fd)
    assert caught.value.errno == code
    client.end()
    region.unmap(0, 16 * MIB)
    mount.until(lambda: not held(mount, fd), "it is let go")
    os.close(fd)


@pytest.mark.parametrize("how", ["fsync", "sync", "msync"])
def test_what_was_stored_is_on_the_disk(mount, region, tmp_path, clients, how):  # noqa: F811
    with on_loop(tmp_path, "ext4", 8 * MIB) as place:
        fd = os.open(place / "object", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, bytes(4 * PAGE), 0)
        region.map(0, 4 * PAGE, "rw-", fd=fd)
        client = clients().map(mount.path / "r")
        text = os.urandom(16)
        for at, byte in enumerate(text):
            assert client.store(2 * PAGE + at, byte) == "ok"
        assert text not in (tmp_path / "ext4.img").read_bytes()
        if how == "msync":
            assert client.do(f"sync {2 * PAGE} {PAGE}") == "ok"
        elif how == "sync":
            region.sync(2 * PAGE, PAGE)
        else:
            os.fsync(region.fd)
        assert text in (tmp_path / "ext4.img").read_bytes()
        client.end()
        region.unmap(0, 4 * PAGE)
        mount.until(lambda: not held(mount, fd), "it is let go")
        os.close(fd)


def test_a_read_only_filesystem_is_read(mount, region, tmp_path, clients):  # noqa: F811
    with on_loop(tmp_path, "ext4", 8 * MIB) as place:
        (place / "object").write_bytes(b"r" * PAGE)
        run("mount", "-o", "remount,ro", place)
        fd = os.open(place / "object", os.O_RDONLY)
        region.map(0, PAGE, "r--", fd=fd)
        client = clients().map(mount.path / "r")
        assert client.load(5) == str(ord("r"))
        assert client.store(5) == f"{SEGV} 5"
        client.end()
        region.unmap(0, PAGE)
        mount.until(lambda: not held(mount, fd), "it is let go")
        os.close(fd)


def test_a_hundred_files_in_a_program(mount, tmp_path, clients):  # noqa: F811
    opened = []
    for number in range(100):
        opened.append(os.open(tmp_path / f"object{number}", os.O_RDWR | os.O_CREAT))
        os.write(opened[-1], bytes([number]) * PAGE)
    with Region.create(mount.path / "many", 100 * PAGE) as region:
        before = clients().map(mount.path / "many", size=100 * PAGE)
        for number, fd in enumerate(opened):
            region.map(number * PAGE, PAGE, "rw-", fd=fd)
        after = clients().map(mount.path / "many", size=100 * PAGE)
        for number, fd in enumerate(opened):
            assert before.load(number * PAGE) == after.load(number * PAGE) == str(number)
            assert before.store(number * PAGE + 1, 100 + number % 100) == "ok"
            assert os.pread(fd, 2, 0) == bytes([number, 100 + number % 100])
        before.end()
        after.end()
        os.unlink(mount.path / "many")
    mount.until(lambda: not any(held(mount, fd) for fd in opened), "all of them")
    for fd in opened:
        os.close(fd)
