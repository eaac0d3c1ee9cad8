"""What the kernel series' own selftests do, on the default mount and on a strict one.

Written from their description, not from their text. Each step is run for each size that they have,
with memory and with a file in the region, with each gate: with none as far as nobody has to obey.
On the default mount a region is as long as what lies in it; on a strict one it is 512 GiB long, and
found at a multiple of that. Source: tools/testing/selftests/mshare in the postings of August and
September 2025 to linux-kselftest, basic.c.
"""

from __future__ import annotations

import os
import signal

import attrs
import pytest

from tests.conftest import GATE
from tests.v3.actors import Caught
from tests.v3.conftest import ALIGNMENT, ANON, PAGE, create_mapping, unmap

KIB, MIB = 1 << 10, 1 << 20
SIZES = {"4k": 4 * KIB, "8k": 8 * KIB, "2m": 2 * MIB, "4m": 4 * MIB}
SHARED_FIXED = 0x11
RW = 3
HINT = 5 * ALIGNMENT
gate = GATE or "ptrace"


@attrs.frozen
class Case:
    """A mount, and what is to lie in the regions that are made on it."""

    mount: object
    strict: bool
    kind: str
    size: int
    file: object

    @property
    def path(self):
        return self.mount.path / "mshare-test"

    @property
    def window(self):
        """How long the region is, and each mapping of it."""
        return ALIGNMENT if self.strict else self.size

    def create(self):
        """A region with the object in it, and its maker's descriptor closed."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        assert int((self.mount.path / "mshare_info").read_text()) == (
            ALIGNMENT if self.strict else PAGE
        )
        os.ftruncate(fd, self.window)
        assert self.fill(fd) == ""
        os.close(fd)

    def fill(self, fd):
        if self.kind == "anon":
            return create_mapping(fd, 0, self.size, RW, ANON)
        with self.file.open("r+b") as opened:
            os.ftruncate(opened.fileno(), self.size)
            return create_mapping(fd, 0, self.size, RW, SHARED_FIXED, obj=opened.fileno())

    def change(self, call):
        fd = os.open(self.path, os.O_RDWR)
        assert call(fd) == ""
        os.close(fd)

    def in_object(self, offset):
        """The byte that the file has there; only a file can be looked at from outside."""
        with self.file.open("rb") as opened:
            return os.pread(opened.fileno(), 1, offset)[0]


@pytest.fixture(params=["default", "strict"])
def alignment(request):
    return request.param


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


@pytest.fixture(params=["gated-anon", "gated-file", "none-anon"])
def kind(request):
    """With which gate, and what lies in the region; without one nobody is shown a file."""
    return request.param.split("-")


@pytest.fixture
def case(mounts, alignment, kind, size, tmp_path):
    options = "strict=v3," if alignment == "strict" else ""
    mount = mounts(f"{options}gate={gate if kind[0] == 'gated' else 'none'}")
    file = tmp_path / "object"
    file.touch()
    case = Case(mount, alignment == "strict", kind[1], size, file)
    yield case
    case.path.unlink(missing_ok=True)


def test_what_one_process_writes_another_reads_at_another_address(case, actor, tmp_path):
    case.create()
    child = actor.fork(tmp_path)
    at = actor.map(case.path, case.window, HINT)
    there = child.map(case.path, case.window, 2 * HINT)
    assert at == HINT
    assert there == 2 * HINT
    for writer, reader, to, of in ((actor, child, at, there), (child, actor, there, at)):
        for offset in (0, case.size // 2 + 1, case.size - 1):
            value = offset % 251 + writer.pid % 3 + 1
            assert writer.call("poke", to + offset, value) == 0
            assert reader.call("peek", of + offset) == value
            if case.kind == "file":
                assert case.in_object(offset) == value


def test_a_child_has_what_its_parent_mapped(case, actor, tmp_path):
    case.create()
    at = actor.map(case.path, case.window)
    assert isinstance(at, int)
    assert actor.call("poke", at, 0x42) == 0
    child = actor.fork(tmp_path)
    assert child.call("peek", at) == 0x42
    assert child.call("poke", at + case.size - 1, 0x43) == 0
    assert actor.call("peek", at + case.size - 1) == 0x43
    assert child.call("munmap", at, case.window) == 0
    assert actor.call("peek", at) == 0x42, "which is the child's affair alone"


@pytest.mark.parametrize("kind", ["gated-anon", "gated-file"], indirect=True)
def test_access_after_unmap_is_a_sigsegv(case, actor, tmp_path):
    case.create()
    child = actor.fork(tmp_path)
    at, there = actor.map(case.path, case.window), child.map(case.path, case.window, HINT)
    for one, to in ((actor, at), (child, there)):
        assert one.call("poke", to, 1) == 0
    case.change(lambda fd: unmap(fd, 0, case.size))
    for one, to in ((actor, at), (child, there)):
        for offset in (0, case.size - 1):
            assert one.call("peek", to + offset) == Caught(signal.SIGSEGV, to + offset)
            assert one.call("poke", to + offset, 1) == Caught(signal.SIGSEGV, to + offset)


@pytest.mark.parametrize("kind", ["gated-anon", "gated-file"], indirect=True)
def test_what_is_mapped_again_is_there_at_once(case, actor):
    case.create()
    at = actor.map(case.path, case.window)
    assert actor.call("poke", at + 1, 0x33) == 0
    case.change(lambda fd: unmap(fd, 0, case.size))
    assert actor.call("peek", at + 1) == Caught(signal.SIGSEGV, at + 1)
    case.change(case.fill)
    kept = 0x33 if case.kind == "file" else 0
    assert actor.call("peek", at + 1) == kept, "a file keeps what it has, memory does not"
    assert actor.call("poke", at + 1, 0x34) == 0


@pytest.mark.parametrize("kind", ["gated-anon", "none-anon"], indirect=True)
def test_a_region_lives_without_its_name_and_its_maker(case, actors):
    maker, user = actors(), actors()
    case.create()
    at = maker.map(case.path, case.window)
    there = user.map(case.path, case.window)
    case.path.unlink()
    assert maker.call("poke", at, 7) == 0
    maker.into.close()
    assert maker.process.wait(60) == 0
    assert user.call("peek", there) == 7


@pytest.mark.parametrize("kind", ["none-file"], indirect=True)
@pytest.mark.parametrize("size", ["4k"], indirect=True)
def test_without_a_gate_nobody_is_shown_a_file(case):
    fd = os.open(case.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.ftruncate(fd, case.window)
    assert case.fill(fd) == "ENOTSUP"
    os.close(fd)
