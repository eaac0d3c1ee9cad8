"""QEMU with the guest's memory as a file on the mount, and another process that maps it too.

A kernel boots in that memory. The other process finds a page that the guest shows, and the two
write to each other through it; then a part of the guest's memory is protected from outside, and
the guest goes on.
"""

from __future__ import annotations

import errno
import gzip
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msharefs.client import Region

HERE = Path(__file__).parent
KERNEL = Path(__file__).parents[2] / ".venv" / "guest" / "vmlinuz"
SIZE = 96 << 20
PAGE = 4096
PATIENCE = 120
MARK = b"".join(struct.pack("<Q", (0x9E3779B97F4A7C15 ^ 1) * (2 * i + 3) % 2**64) for i in range(4))

STORE = """
import mmap, os, sys
path, offset = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR)
memory = mmap.mmap(fd, 0)
memory[offset] = memory[offset]
"""


def cpio(name: str, content: bytes, mode: int, device: tuple[int, int] = (0, 0)) -> bytes:
    """One file of an initramfs (cpio(5), the new portable format)."""
    encoded = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    padded = header + encoded
    padded += bytes(-len(padded) % 4) + content
    return padded + bytes(-len(padded) % 4)


@pytest.fixture
def initramfs(tmp_path):
    """The guest's whole file system: our program, and the console it prints to."""
    init = tmp_path / "init"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-static"]
    subprocess.run(["cc", *flags, "-o", str(init), str(HERE / "guest.c")], check=True)
    archive = tmp_path / "initramfs.gz"
    with gzip.open(archive, "wb", compresslevel=1) as file:
        file.write(cpio("dev", b"", 0o40755))
        file.write(cpio("dev/console", b"", 0o20600, (5, 1)))
        file.write(cpio("init", init.read_bytes(), 0o100755))
        file.write(cpio("TRAILER!!!", b"", 0))
    return archive


class Guest:
    """QEMU as a process; ``said`` waits for a line on the guest's console."""

    def __init__(self, qemu: str, memory: Path, initramfs: Path) -> None:
        self.seen = b""
        backend = f"memory-backend-file,id=ram,size={SIZE},mem-path={memory},share=on"
        words = f"-nodefaults -nographic -no-reboot -accel tcg -m {SIZE >> 20}M -smp 1"
        words += f" -machine pc,memory-backend=ram -object {backend} -serial stdio"
        words += f" -kernel {KERNEL} -initrd {initramfs}"
        append = "console=ttyS0 quiet panic=-1 nokaslr"
        self.process = subprocess.Popen(
            [qemu, *words.split(), "-append", append],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def said(self, line: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        output = self.process.stdout
        while line not in self.seen:
            ready, _, _ = select.select([output], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no {line!r} within {PATIENCE} s: {self.seen!r}"
            more = os.read(output.fileno(), 65536)
            assert more, f"QEMU ended: {self.seen!r}"
            self.seen += more


@pytest.fixture
def guest(automap, program, initramfs):
    qemu = program("qemu-system-x86_64", package="qemu-system-x86")
    if not KERNEL.exists():
        pytest.skip("a kernel for the guest is missing (scripts/setup --test fetches one)")
    started = Guest(qemu, automap.path / "guest", initramfs)
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.wait(PATIENCE)
    started.process.stdout.close()


def until(reached, what: str) -> None:
    """Wait for memory that another process writes; there is nothing else to wait on."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE} s"
        os.sched_yield()


def store(path: Path, offset: int) -> int:
    """How a fresh process ends that maps the file read-write and stores to that byte."""
    command = [sys.executable, "-c", STORE, str(path), str(offset)]
    return subprocess.run(command, check=False, timeout=PATIENCE).returncode


def test_a_guest_boots_in_a_file_and_shares_it(automap, guest):
    path = automap.path / "guest"
    guest.said(b"guest: up")
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, SIZE)
    page = memory.find(MARK)
    assert page >= 0
    assert page % PAGE == 0

    def word(number: int) -> int:
        return struct.unpack_from("<Q", memory, page + 8 * number)[0]

    def say(value: int) -> None:
        struct.pack_into("<Q", memory, page + 8 * 4, value)

    say(1)
    guest.said(b"guest: seen")
    assert word(5) == 1
    say(2)
    until(lambda: word(6) > 0, "the guest counts")
    clients = (automap.path / ".control" / "guest" / "clients").read_text()
    pids = {int(line.split()[0]) for line in clients.splitlines()}
    assert {guest.process.pid, os.getpid()} <= pids
    maps = (automap.path / ".control" / "guest" / "maps").read_text().splitlines()
    assert len(maps) == 1
    assert " rw-s " in maps[0]

    # The first page of real mode memory: the guest has no use for it any more.
    with Region.open(path, writable=True) as region:
        region.protect(0, PAGE, "r--")
        with pytest.raises(OSError) as caught:
            os.pwrite(fd, b"x", 100)
        assert caught.value.errno == errno.EACCES
        assert os.pwrite(fd, memory[PAGE : PAGE + 1], PAGE) == 1, "the rest is as it was"
        if enforced(automap):
            assert store(path, 100) == -signal.SIGSEGV
        assert store(path, PAGE) == 0
        before = word(6)
        until(lambda: word(6) > before, "the guest goes on beside it")
        region.protect(0, PAGE, "rw-")
    assert store(path, 100) == 0
    say(3)
    guest.said(b"guest: end")
    assert guest.process.wait(PATIENCE) == 0
    memory.close()
    os.close(fd)


def enforced(mount) -> bool:
    """Whether this mount's clients are held to the table."""
    clients = (mount.path / ".control" / "guest" / "clients").read_text()
    return "unenforced" not in clients
