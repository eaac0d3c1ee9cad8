"""What is laid over a plain file holds in the programs that map it, whatever they mapped it for."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys

import pytest

from msharefs.client import Region

PAGE = 4096
RW = mmap.PROT_READ | mmap.PROT_WRITE

PROGRAM = """
import ctypes, mmap, os, sys
path, flags, prot, length, twice = sys.argv[1], *map(int, sys.argv[2:])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
fd = os.open(path, flags)
place = libc.mmap(None, length, prot, mmap.MAP_SHARED, fd, 0)
assert place != ctypes.c_void_p(-1).value, ctypes.get_errno()
if twice:
    assert libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) != place
print("mapped", flush=True)
for line in sys.stdin:
    word, offset = line.split()
    byte = ctypes.c_ubyte.from_address(place + int(offset))
    if word == "load":
        print(byte.value, flush=True)
    else:
        byte.value = int(word)
        print("stored", flush=True)
"""


class Mapper:
    """A program that maps a file and does as it is told."""

    def __init__(self, path, flags=os.O_RDWR, prot=RW, length=16 * PAGE, *, twice=False):
        words = [str(path), *map(str, (flags, prot, length, int(twice)))]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout.readline() == "mapped\n"
        self.path = path

    def told(self, line: str) -> str:
        """What it answers; the name of the signal that ended it, if it does not."""
        self.process.stdin.write(line + "\n")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        return answer or signal.Signals(-self.process.wait(60)).name

    def windows(self) -> list[tuple[int, str]]:
        """(pages, protection) of its mappings of the file, in order."""
        found = []
        with open(f"/proc/{self.process.pid}/maps") as maps:
            for line in maps:
                place, prot, *_, name = line.split()
                if name == str(self.path):
                    start, end = (int(number, 16) for number in place.split("-"))
                    found.append(((end - start) // PAGE, prot))
        return found

    def end(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def mapper():
    started = []

    def start(*arguments, **named):
        started.append(Mapper(*arguments, **named))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(params=["", ",private=allow"], ids=["held", "found later"])
def automap(start_mount, request):
    return start_mount(f"automap,size=16M{request.param}")


@pytest.fixture
def path(automap):
    place = automap.path / "f"
    place.write_bytes(b"x" * 16 * PAGE)
    return place


def test_protection_takes_from_everybody_and_gives_back_what_each_had(path, mapper):
    writer, reader = mapper(path), mapper(path, os.O_RDONLY, mmap.PROT_READ)
    modest = mapper(path, os.O_RDWR, mmap.PROT_READ)
    with Region.open(path) as region:
        region.protect(4 * PAGE, 4 * PAGE, "r--")
        assert writer.windows() == [(4, "rw-s"), (4, "r--s"), (8, "rw-s")]
        region.protect(5 * PAGE, PAGE, "---")
        assert writer.windows() == [(4, "rw-s"), (1, "r--s"), (1, "---s"), (2, "r--s"), (8, "rw-s")]
        assert reader.windows() == [(5, "r--s"), (1, "---s"), (10, "r--s")]
        region.protect(0, 16 * PAGE, "rw-")
        assert writer.windows() == [(16, "rw-s")]
        assert reader.windows() == modest.windows() == [(16, "r--s")]
        assert writer.told(f"7 {5 * PAGE}") == "stored"
        assert reader.told(f"load {5 * PAGE}") == modest.told(f"load {5 * PAGE}") == "7"
        region.protect(4 * PAGE, 4 * PAGE, "r--")
    assert writer.told(f"load {4 * PAGE}") == "120"
    assert writer.told(f"1 {8 * PAGE}") == "stored"
    assert writer.told(f"1 {4 * PAGE}") == "SIGSEGV"
    assert path.read_bytes()[4 * PAGE] == 120


def test_past_the_end_is_sigbus_and_what_grows_there_is_writable(path, mapper):
    writer, other = mapper(path, length=64 * PAGE), mapper(path, length=64 * PAGE)
    with Region.open(path) as region:
        region.protect(0, PAGE, "r--")
        assert writer.windows() == [(1, "r--s"), (63, "rw-s")]
        region.resize(32 * PAGE)
        assert writer.told(f"9 {31 * PAGE}") == "stored"
        assert writer.told(f"load {31 * PAGE}") == "9"
    assert other.told(f"9 {32 * PAGE}") == "SIGBUS"
    assert writer.told(f"9 {40}") == "SIGSEGV"


def test_what_grows_anew_is_writable_where_it_was_protected(path, mapper):
    writer = mapper(path)
    with Region.open(path) as region:
        region.protect(8 * PAGE, 8 * PAGE, "r--")
        assert writer.windows() == [(8, "rw-s"), (8, "r--s")]
        region.resize(10 * PAGE)
        region.resize(16 * PAGE)
        assert [(m.size // PAGE, m.prot.text()) for m in region] == [
            (8, "rw-"),
            (2, "r--"),
            (6, "rw-"),
        ]
    assert writer.windows() == [(8, "rw-s"), (2, "r--s"), (6, "rw-s")]
    assert writer.told(f"5 {12 * PAGE}") == "stored"
    assert writer.told(f"5 {9 * PAGE}") == "SIGSEGV"


def test_what_grows_by_write_is_writable_where_it_was_protected(path, mapper):
    writer = mapper(path)
    with Region.open(path) as region:
        region.protect(8 * PAGE, 8 * PAGE, "r--")
        region.resize(10 * PAGE)
        os.pwrite(region.fd, b"n", 12 * PAGE)
    assert writer.told(f"5 {12 * PAGE}") == "stored"
    assert writer.told(f"5 {9 * PAGE}") == "SIGSEGV"


def test_a_hole_laid_into_a_file_is_a_fault_until_it_is_mapped_again(path, mapper):
    writer, victim = mapper(path), mapper(path)
    with Region.open(path) as region:
        region.unmap(4 * PAGE, PAGE)
        assert writer.windows() == [(4, "rw-s"), (1, "---s"), (11, "rw-s")]
        assert victim.told(f"load {4 * PAGE}") == "SIGSEGV"
        region.map(4 * PAGE, PAGE, "rw-")
    assert writer.windows() == [(16, "rw-s")]
    assert writer.told(f"load {4 * PAGE}") == "0"
    assert writer.told(f"3 {4 * PAGE}") == "stored"


def test_a_mapping_made_after_the_protection_obeys_it(path, mapper):
    with Region.open(path) as region:
        region.protect(4 * PAGE, 4 * PAGE, "r--")
    late = mapper(path)
    assert late.windows() == [(4, "rw-s"), (4, "r--s"), (8, "rw-s")]
    assert mapper(path, os.O_RDONLY, mmap.PROT_READ).windows() == [(16, "r--s")]
    assert late.told(f"1 {5 * PAGE}") == "SIGSEGV"


def test_two_mappings_of_one_process_keep_their_own_rights(path, mapper):
    both = mapper(path, twice=True)
    with Region.open(path) as region:
        region.protect(0, PAGE, "r--")
        assert sorted(both.windows()) == [(1, "r--s"), (15, "rw-s"), (16, "r--s")]
        region.protect(0, PAGE, "rw-")
    assert sorted(both.windows()) == [(16, "r--s"), (16, "rw-s")]
    assert both.told("1 0") == "stored"


def test_other_regions_shrink_in_every_process_too(mount, mapper):
    place = mount.path / "r"
    with Region.create(place, 16 * PAGE) as region:
        region.map(0, 16 * PAGE, "rw-")
        writer = mapper(place)
        region.resize(8 * PAGE)
        region.resize(16 * PAGE)
        assert [m.size for m in region] == [8 * PAGE], "what grows is a hole"
        assert writer.windows() == [(8, "rw-s"), (8, "---s")]
        assert writer.told(f"1 {7 * PAGE}") == "stored"
        assert writer.told(f"1 {8 * PAGE}") == "SIGSEGV"


PRIVATE = """
import errno, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    copy = mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE)
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    copy[0] = 1
    print(os.pread(fd, 1, 0).decode())
"""


def test_private_mappings_are_refused_or_let_in(automap, path):
    # A new process: this one may still be followed from what it opened before.
    said = subprocess.run(
        [sys.executable, "-c", PRIVATE, str(path)], stdout=subprocess.PIPE, text=True, check=True
    )
    allowed = "private=allow" in served_options(automap)
    assert said.stdout == ("x\n" if allowed else "EINVAL\n")


def served_options(served) -> str:
    return served.process.args[served.process.args.index("-o") + 1]
