"""Whole mounts, seen by programs: sharing, names, memory, events, and who dies when."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import select
import signal
import stat
import subprocess
import sys
import time

import pytest

from msharefs.abi import Command
from msharefs.client import Region
from msharefs.service.mounts import unmount

MIB = 1 << 20

SHARER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 1 << 20)
for line in sys.stdin:
    offset, value = map(int, line.split())
    before = memory[offset]
    memory[offset] = value
    print(before, flush=True)
"""


@pytest.fixture
def region(mount):
    with Region.create(mount.path / "r", 2 * MIB) as made:
        made.map(0, MIB, "rw-")
        yield made


def refused(code, call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code


def test_two_unmodified_processes_share_memory_and_never_meet_the_server(mount, region):
    before = mount.stats("r")
    with region.mmap(length=MIB) as memory:
        child = subprocess.Popen(
            [sys.executable, "-c", SHARER, str(mount.path / "r")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            for page in range(256):
                memory[page * 4096] = page % 251
                child.stdin.write(f"{page * 4096} {page % 7}\n")
                child.stdin.flush()
                assert int(child.stdout.readline()) == page % 251
                assert memory[page * 4096] == page % 7
        finally:
            child.stdin.close()
            assert child.wait(60) == 0
            child.stdout.close()
    after = mount.stats("r")
    assert [after[key] - before[key] for key in ("read", "write")] == [0, 0]
    assert after["allocated"] == MIB
    # The counters would have seen any: also those that are refused.
    refused(errno.ENXIO, os.pread, region.fd, 1, MIB)
    refused(errno.ENXIO, os.pwrite, region.fd, b"x", MIB)
    os.pread(region.fd, 1, 0)
    os.pwrite(region.fd, b"x", 0)
    seen = mount.stats("r")
    assert [seen[key] - after[key] for key in ("read", "write")] == [2, 2]


def test_memory_is_freed_with_the_mapping_and_st_blocks_tell(start_mount):
    mount = start_mount("gate=none")  # so that what was unmapped can still be looked at
    with Region.create(mount.path / "r", 4 * MIB) as region:
        region.map(0, MIB, "rw-")
        with region.mmap(length=MIB) as memory:
            memory[:] = b"x" * MIB
            assert (mount.path / "r").stat().st_blocks == MIB // 512
            region.unmap(0, MIB // 2)
            assert (mount.path / "r").stat().st_blocks == MIB // 1024
            assert memory[0] == 0, "dropped in every process"
        region.resize(0)
        assert (mount.path / "r").stat().st_blocks == 0


def test_a_mapping_outlives_name_and_descriptor(mount, region):
    memory = region.mmap(length=MIB)
    region.close()
    (mount.path / "r").unlink()
    assert not (mount.path / "r").exists()
    assert not (mount.path / ".control" / "r").exists()
    memory[0] = 7
    assert memory[0] == 7
    memory.close()


def test_names_move_and_control_files_follow(mount, region):
    os.mkdir(mount.path / "d")
    os.rename(mount.path / "r", mount.path / "d" / "s")
    os.link(mount.path / "d" / "s", mount.path / "t")
    assert (mount.path / "t").stat().st_nlink == 2
    assert (mount.path / "t").stat().st_ino == (mount.path / "d" / "s").stat().st_ino
    assert "rw-s" in (mount.path / ".control" / "d" / "s" / "maps").read_text()
    refused(errno.ENOTEMPTY, os.rmdir, mount.path / "d")
    refused(errno.EINVAL, os.rename, mount.path / "d", mount.path / "d" / "e")
    assert sorted(os.listdir(mount.path)) == [".control", "d", "mshare_info", "t"]
    assert sorted(os.listdir(mount.path / ".control")) == ["d", "events", "t"]
    os.unlink(mount.path / "d" / "s")
    os.rmdir(mount.path / "d")
    assert (mount.path / "t").stat().st_nlink == 1


def test_modes_times_and_umask_are_kept(mount):
    old = os.umask(0o027)
    try:
        os.close(os.open(mount.path / "u", os.O_CREAT | os.O_RDWR, 0o666))
    finally:
        os.umask(old)
    assert stat.S_IMODE((mount.path / "u").stat().st_mode) == 0o640
    os.chmod(mount.path / "u", 0o600)
    os.chown(mount.path / "u", 12, 34)
    os.utime(mount.path / "u", ns=(10**18, 2 * 10**18))
    found = (mount.path / "u").stat()
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (12, 34, 2 * 10**18)
    assert stat.S_IMODE(mount.path.stat().st_mode) == 0o1777


def test_the_kernel_keeps_users_apart(mount, region):
    program = (
        "import os, sys; os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534)\n"
        "os.close(os.open('mine', os.O_CREAT | os.O_RDWR, 0o600))\n"
        "for call in (lambda: os.open('r', os.O_RDWR), lambda: os.unlink('r'),\n"
        "             lambda: os.open('.control/events', os.O_RDONLY),\n"
        "             lambda: os.open('.control/r/maps', os.O_RDONLY)):\n"
        "    try: call()\n"
        "    except PermissionError: continue\n"
        "    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(mount.path)], check=False)
    assert done.returncode == 0
    assert (mount.path / "mine").stat().st_uid == 65534


def test_a_full_mount_says_so_and_goes_on(start_mount):
    mount = start_mount("size=1M")
    with Region.create(mount.path / "r", 4 * MIB) as region:
        region.map(0, MIB, "rw-")
        assert os.statvfs(mount.path).f_bavail == 0
        refused(errno.ENOSPC, region.map, MIB, MIB, "rw-")
        with region.mmap(length=MIB) as memory:
            memory[:] = b"x" * MIB
        region.unmap(0, 4096)
        region.map(MIB, 4096, "rw-")
    (mount.path / "r").unlink()
    assert os.statvfs(mount.path).f_blocks == 256
    mount.until(lambda: os.statvfs(mount.path).f_bavail == 256, "all of it free again")


@pytest.mark.parametrize("policy", ["never", "advise", "always", "within_size"])
def test_huge_policies_mount(start_mount, policy):
    mount = start_mount(f"huge={policy}")
    with Region.create(mount.path / "r", 4 * MIB) as region:
        region.map(0, 4 * MIB, "rw-")
        with region.mmap() as memory:
            memory[0] = 1
        blocks = (mount.path / "r").stat().st_blocks * 512
    assert blocks == (2 * MIB if policy in {"always", "within_size"} else 4096)


def open_events(mount, name="r"):
    return os.open(mount.path / ".control" / name / "events", os.O_RDONLY | os.O_NONBLOCK)


def test_events_wake_poll_and_epoll_and_have_an_end(mount, region):
    fd = open_events(mount)
    try:
        seen = [json.loads(line)["event"] for line in os.read(fd, 65536).splitlines()]
        assert seen == ["open", "resize", "map"]
        refused(errno.EAGAIN, os.read, fd, 10)
        poll, epoll = select.poll(), select.epoll()
        poll.register(fd, select.POLLIN)
        epoll.register(fd, select.EPOLLIN)
        assert poll.poll(0) == []
        region.protect(0, 4096, "r--")
        assert poll.poll(10_000) == [(fd, select.POLLIN)]
        assert epoll.poll(10) == [(fd, select.EPOLLIN)]
        epoll.close()
        event = json.loads(os.read(fd, 65536))
        assert (event["event"], event["length"], event["prot"]) == ("protect", 4096, "r--")
        assert event["pid"] == os.getpid()
        region.close()
        (mount.path / "r").unlink()
        while (line := _wait_and_read(fd)) != b"":
            assert json.loads(line)["event"] == "unlink"
    finally:
        os.close(fd)


def _wait_and_read(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(30_000)
    return os.read(fd, 65536)


def test_a_reader_that_falls_behind_is_told_how_far(start_mount):
    mount = start_mount("events=160")
    with Region.create(mount.path / "r", MIB) as region:
        region.map(0, MIB, "rw-")
        fd = open_events(mount)
        try:
            for prot in ("r--", "rw-") * 20:
                region.protect(0, MIB, prot)
            lines = [json.loads(line) for line in os.read(fd, 65536).splitlines()]
        finally:
            os.close(fd)
    assert lines[0]["event"] == "overflow"
    assert lines[0]["lost"] == 3 + 40 - 10
    assert len(lines) == 1 + 10


BLOCKED_READER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError))
fd = os.open(sys.argv[1], os.O_RDONLY)
os.read(fd, 65536)
try:
    print("blocking", flush=True)
    os.read(fd, 65536)
except InterruptedError:
    sys.exit(7)
"""


def in_read(pid):
    """Whether the process waits in read(2), which is system call 0 (proc_pid_syscall(5))."""
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().startswith("0 ")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, 7), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_blocked_reader_can_be_interrupted_and_killed(mount, region, number, status):
    path = mount.path / ".control" / "r" / "events"
    reader = subprocess.Popen(
        [sys.executable, "-c", BLOCKED_READER, str(path)], stdout=subprocess.PIPE
    )
    try:
        assert reader.stdout.readline() == b"blocking\n"
        deadline = time.monotonic() + 60
        while not in_read(reader.pid):
            assert reader.poll() is None
            assert time.monotonic() < deadline
        reader.send_signal(number)
        assert reader.wait(60) == status
    finally:
        reader.kill()
        reader.communicate()
    region.protect(0, 4096, "r--")  # the mount lives


def test_malformed_ioctls_hurt_nobody(mount, region):
    for size in (0, 8, 24, 4096, 16383):
        for number in (0, 1, 0x10, 0x11, 0x14, 0xFF):
            command = 3 << 30 | size << 16 | ord("x") << 8 | number
            if command in set(Command):
                continue
            refused(errno.ENOTTY, fcntl.ioctl, region.fd, command, bytearray(max(size, 8)))
    assert region.query(0) is not None


def test_descriptors_of_the_server_come_back(mount):
    with Region.create(mount.path / "first", MIB) as region:
        region.map(0, MIB, "rw-")  # what the server keeps from its first change on, a thread
    before = mount.descriptors()
    for number in range(50):
        with Region.create(mount.path / f"r{number}", MIB) as region:
            region.map(0, MIB, "rw-")
    mount.until_descriptors(before + 50)
    for number in range(50):
        (mount.path / f"r{number}").unlink()
    mount.until_descriptors(before)


def test_sigint_unmounts(start_mount):
    mount = start_mount()
    mount.stop(signal.SIGINT)


def test_mappings_go_on_when_the_server_is_killed(start_mount):
    mount = start_mount()
    mount.expect_exit = -signal.SIGKILL
    region = Region.create(mount.path / "r", MIB)
    region.map(0, MIB, "rw-")
    memory = mmap.mmap(region.fd, MIB)
    mount.process.kill()
    mount.process.wait()
    memory[0] = 1
    memory[8192] = 2
    assert (memory[0], memory[8192]) == (1, 2)
    refused(errno.ENOTCONN, os.stat, mount.path / "r")
    memory.close()
    with pytest.raises(OSError, match="not connected"):
        region.protect(0, 4096, "r--")
    region.close()
    unmount(mount.path, detach=True)
