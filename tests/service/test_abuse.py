"""Clients that do harm: bad input, floods, deaths at bad moments. Each must hurt only itself."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
import time

import pytest

from msharefs.abi import Command, CreateArgs, MapFlag
from msharefs.client import Region

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def region(mount):
    with Region.create(mount.path / "r", MIB) as made:
        made.map(0, MIB // 2, "rw-")
        yield made


def maps(mount, name="r"):
    return (mount.path / ".control" / name / "maps").read_text()


def test_every_size_of_every_number_is_answered(mount, region):
    """The kernel copies as many bytes as the number says; only seven numbers are known."""
    before, known = maps(mount), {int(command) for command in Command}
    argument = bytearray(1 << 14)
    for direction in range(4):
        for number in range(0x20):
            for size in (0, 1, 15, 16, 24, 36, 40, 41, 64, 72, 4095, 4096, 16383):
                command = direction << 30 | size << 16 | ord("x") << 8 | number
                if command not in known:
                    with pytest.raises(OSError) as caught:
                        fcntl.ioctl(region.fd, command, argument)
                    assert caught.value.errno == errno.ENOTTY, hex(command)
    assert maps(mount) == before


def test_wild_offsets_change_nothing(mount, region):
    """Each 64-bit field at its extremes: EINVAL or ENOENT, whatever the other fields say."""
    before, rng = maps(mount), random.Random(5)
    wild = [1 << n for n in range(21, 64)] + [(1 << n) - PAGE for n in range(22, 65)]
    wild += [(1 << 64) - 1, 1, PAGE - 1, PAGE + 1, MIB, MIB - PAGE + 1]
    flags = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)
    for offset in wild:
        size = rng.choice([PAGE, 0, offset, (1 << 64) - offset, (1 << 64) - PAGE])
        size %= 1 << 64
        for command, packed in (
            (Command.CREATE_MAPPING, CreateArgs(offset, size, 0, 3, flags).pack()),
            (Command.UNMAP, struct.pack("=QQ", offset, size)),
            (Command.PROTECT, struct.pack("=QQII", offset, size, 1, 0)),
            (Command.NOTIFY, struct.pack("=QQIIIIII", offset, size, 1, 0, 0, 0, 0, 0)),
            (Command.SYNC, struct.pack("=QQII", offset, size, 0, 0)),
        ):
            with pytest.raises(OSError) as caught:
                fcntl.ioctl(region.fd, command, bytearray(packed))
            assert caught.value.errno == errno.EINVAL, (command.name, hex(offset), hex(size))
    for offset in wild:
        if offset >= MIB // 2:
            assert region.query(offset, next=True) is None
    assert maps(mount) == before


FLOOD = """
import fcntl, sys
path, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "r+b", buffering=0) as file:
    print("open", flush=True)
    sys.stdin.readline()
    refused = 0
    for _ in range(count):
        try:
            fcntl.ioctl(file, number, bytearray(b"\\xff" * 64))
        except OSError:
            refused += 1
print(refused)
"""


def test_a_flood_of_bad_calls_is_refused_and_others_are_served(start_mount):
    """Six processes call as fast as they can, each with a mistake of its own."""
    mount, count = start_mount("events=160"), 3000
    with Region.create(mount.path / "r", MIB) as region:
        region.map(0, MIB, "rw-")
        reader = os.open(mount.path / ".control" / "r" / "events", os.O_RDONLY | os.O_NONBLOCK)
        before = mount.descriptors()
        numbers = [*map(int, (Command.UNMAP, Command.PROTECT, Command.QUERY, Command.NOTIFY))]
        numbers += [int(Command.CREATE_MAPPING), 0x7840]
        flood = [
            subprocess.Popen(
                [sys.executable, "-c", FLOOD, str(mount.path / "r"), str(number), str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in numbers
        ]
        try:
            assert [process.stdout.readline() for process in flood] == ["open\n"] * len(flood)
            for process in flood:
                process.stdin.write("go\n")
                process.stdin.flush()
            served = 0
            deadline = time.monotonic() + 120
            while any(process.poll() is None for process in flood) or served < 20:
                prot = "r--" if served % 2 else "rw-"
                region.protect(0, PAGE, prot)
                assert region.query(0).prot.text() == prot
                served += 1
                assert time.monotonic() < deadline
            assert [int(process.stdout.read()) for process in flood] == [count] * len(flood)
        finally:
            for process in flood:
                process.kill()
                process.communicate()
        stats = mount.stats("r")
        assert stats["refuse"] == (len(numbers) - 1) * count, "an unknown number tells nobody"
        assert stats["protect"] == served
        lines = [json.loads(line) for line in os.read(reader, MIB).splitlines()]
        os.close(reader)
        assert lines[0]["event"] == "overflow"
        assert lines[0]["lost"] + len(lines) - 1 == stats["refuse"] + served + 3 + len(flood)
        mount.until_descriptors(before)


VICTIM = """
import os, sys
from msharefs.client import Region
region = Region.open(sys.argv[1])
while True:
    region.protect(0, 4096, "r--")
    region.protect(0, 4096, "rw-")  # a right that the region does not give: a census comes first
"""


def in_ioctl(pid):
    """Whether the process waits in ioctl(2), which is system call 16 (proc_pid_syscall(5))."""
    with open(f"/proc/{pid}/syscall") as file:
        return file.read().startswith("16 ")


def test_clients_killed_while_their_change_waits_for_a_census(mount):
    """The change is given up whole: no right is given, and nobody waits for its lock."""
    with Region.create(mount.path / "r", MIB) as region:
        region.map(0, PAGE, "rw-")
    given_up = 0
    for _ in range(20):
        done = mount.stats("r")["protect"]
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(mount.path / "r")])
        try:
            deadline = time.monotonic() + 60
            while mount.stats("r")["protect"] < done + 4 or not in_ioctl(victim.pid):
                assert victim.poll() is None
                assert time.monotonic() < deadline
        finally:
            victim.kill()
            victim.wait()
        given_up += "r--" in maps(mount)
        with Region.open(mount.path / "r") as region:
            region.protect(0, PAGE, "rw-")
            assert region.query(0).prot.text() == "rw-"
    assert given_up, "at least one was killed before its change was made"
    mount.until(lambda: not mount.stats("r")["descriptors"], "the victims' descriptors are closed")
    stats = mount.stats("r")
    assert (stats["refuse"], stats["mappings"]) == (0, 1)


def test_a_full_mount_refuses_and_forgets_nothing(start_mount):
    mount = start_mount("size=1M")
    regions = [Region.create(mount.path / f"r{n}", MIB) for n in range(3)]
    regions[0].map(0, MIB // 2, "rw-")
    regions[1].map(0, MIB // 2, "rw-")
    with regions[0].mmap(length=MIB // 2) as memory:
        memory[:] = b"a" * (MIB // 2)
        before = [maps(mount, f"r{n}") for n in range(3)]
        for region in regions:
            with pytest.raises(OSError) as caught:
                region.map(MIB // 2, PAGE, "rw-")
            assert caught.value.errno == errno.ENOSPC
        assert [maps(mount, f"r{n}") for n in range(3)] == before
        assert bytes(memory) == b"a" * (MIB // 2)
        regions[1].map(0, MIB // 2, "r--")  # takes the place of what it replaces
        regions[1].unmap(0, PAGE)
        regions[2].map(0, PAGE, "rw-")
        os.pwrite(regions[2].fd, b"b" * PAGE, 0)
        assert os.pread(regions[2].fd, PAGE, 0) == b"b" * PAGE
        assert bytes(memory) == b"a" * (MIB // 2)
    for region in regions:
        region.close()


def test_a_reader_that_never_reads_costs_the_ring_and_no_more(start_mount):
    """Whatever happens meanwhile; and those who do read are not held up by it."""
    mount = start_mount("events=160")
    with Region.create(mount.path / "r", MIB) as region:
        region.map(0, MIB, "rw-")
        idle = os.open(mount.path / ".control" / "r" / "events", os.O_RDONLY | os.O_NONBLOCK)
        busy = os.open(mount.path / ".control" / "r" / "events", os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.read(busy, MIB)
            for number in range(8000):
                region.protect(0, PAGE, "r--" if number % 2 else "rw-")
                assert json.loads(os.read(busy, MIB))["event"] == "protect"
                if number == 200:
                    memory = mount.memory()
            # An event takes some 500 bytes. The allocator takes half a MiB at once, now and then.
            assert mount.memory() - memory < MIB
            lines = [json.loads(line) for line in os.read(idle, MIB).splitlines()]
            assert (lines[0]["event"], lines[0]["lost"]) == ("overflow", 8003 - 10)
            assert [line["seq"] for line in lines[1:]] == sorted(line["seq"] for line in lines[1:])
            assert len(lines) == 11
        finally:
            os.close(idle)
            os.close(busy)
