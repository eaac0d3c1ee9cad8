"""One userfaultfd, worked from outside: how each call can end."""

from __future__ import annotations

import os
import select
import struct

import pytest
import trio

from msharefs.clients.borrow import borrow
from msharefs.clients.tracer import Tracer
from msharefs.clients.userfault import (
    MESSAGE_SIZE,
    Mode,
    Moved,
    Outcome,
    PageFault,
    Unmapped,
    Userfault,
    UserfaultUnavailable,
    decode,
    make,
)

PAGE = 4096
SIZE = 1 << 20
PATIENCE = 30


@pytest.fixture
def toucher(start_toucher):
    return start_toucher()


@pytest.fixture
def limited(toucher):
    one, other = toucher.userfaults()
    other.close()
    yield one
    one.close()


def messages(userfault):
    poll = select.poll()
    poll.register(userfault.fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000)
    return userfault.read()


def test_messages_are_read_as_the_kernel_writes_them():
    pack = struct.Struct("=B7xQQQ").pack
    data = pack(0x12, 3, 0x1234, 77) + pack(0x12, 4, 0x2000, 78) + pack(0x12, 1, 0x3000, 79)
    data += pack(0x14, 1, 2, 3) + pack(0x15, 1, 2, 0) + pack(0x16, 5, 6, 0)
    assert len(data) == 6 * MESSAGE_SIZE
    assert decode(data) == [
        PageFault(0x1234, 77, True, True, False),
        PageFault(0x2000, 78, False, False, True),
        PageFault(0x3000, 79, True, False, False),
        Moved(1, 2, 3),
        Unmapped(5, 6),
    ]
    with pytest.raises(ValueError, match="event 0x99"):
        decode(pack(0x99, 0, 0, 0))


def test_a_store_is_caught_and_let_go(toucher, limited):
    at = toucher.address
    assert limited.read() == []
    assert limited.register(at, SIZE, Mode.WP) is Outcome.SERVED
    assert limited.protect(at, SIZE) is Outcome.SERVED
    toucher.tell("w 4099")
    assert messages(limited) == [PageFault(at + 4099, toucher.pid, True, True, False)]
    limited.wake(at + PAGE, PAGE)
    assert messages(limited) == [PageFault(at + 4099, toucher.pid, True, True, False)]
    assert limited.unprotect(at + PAGE, PAGE) is Outcome.SERVED
    assert toucher.hear() == "wrote 4099"


def test_missing_and_minor_faults(toucher, limited):
    at = toucher.address
    toucher.tell("w 0")
    toucher.hear()
    assert limited.register(at, SIZE, Mode.WP | Mode.MINOR | Mode.MISSING) is Outcome.SERVED
    toucher.tell("z")
    toucher.hear()
    toucher.tell("r 0")
    assert messages(limited) == [PageFault(at, toucher.pid, False, False, True)]
    assert limited.resume(at, PAGE, protected=True) is Outcome.SERVED
    assert toucher.hear() == "read 42"
    assert limited.resume(at, PAGE, protected=True) is Outcome.THERE
    toucher.tell("w 1")
    assert messages(limited) == [PageFault(at + 1, toucher.pid, True, True, False)]
    assert limited.unprotect(at, PAGE) is Outcome.SERVED
    assert toucher.hear() == "wrote 1"
    toucher.tell("w 8192")
    assert messages(limited) == [PageFault(at + 8192, toucher.pid, True, False, False)]
    assert limited.resume(at + 8192, PAGE, protected=False) is Outcome.ABSENT
    assert limited.zero(at + 8192, protected=False) is Outcome.SERVED
    assert toucher.hear() == "wrote 8192"
    assert limited.zero(at + 8192, protected=False) is Outcome.THERE


def test_what_cannot_be_watched_is_told_apart_from_what_has_gone(toucher, limited):
    at = toucher.address
    assert limited.protect(at, PAGE) is Outcome.UNMAPPED
    assert limited.register(1 << 16, PAGE, Mode.WP) is Outcome.REFUSED
    with open(f"/proc/{toucher.pid}/maps") as maps:
        text = next(line for line in maps if "r-xp" in line and "toucher" in line)
    start = int(text.split("-")[0], 16)
    assert limited.register(start, PAGE, Mode.WP) is Outcome.REFUSED
    assert limited.alive
    toucher.process.kill()
    toucher.process.wait()
    assert not limited.alive
    assert limited.register(at, PAGE, Mode.WP) is Outcome.GONE
    assert limited.unregister(at, PAGE) is Outcome.GONE
    assert limited.protect(at, PAGE) is Outcome.GONE
    assert limited.resume(at, PAGE, protected=True) is Outcome.GONE
    assert limited.zero(at, protected=True) is Outcome.GONE


def test_what_is_no_userfaultfd_is_refused_and_closed():
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(UserfaultUnavailable):
        Userfault.negotiate(fd, user_mode_only=True)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


async def test_a_borrowed_thread_makes_both_and_keeps_none(start_toucher, tmp_path):
    region = tmp_path / "file"
    region.write_bytes(bytes(SIZE))
    toucher = start_toucher(region)
    before = sorted(os.listdir(f"/proc/{toucher.pid}/fd"))
    tracer = Tracer()
    try:
        (made,) = await tracer.run([borrow(toucher.pid, make)])
        assert [u.user_mode_only for u in made] == [True, False]
        assert all(u.alive for u in made)
        assert sorted(os.listdir(f"/proc/{toucher.pid}/fd")) == before
        assert await toucher.do("w 0") == "wrote 0"
        for userfault in made:
            userfault.close()
            userfault.close()
    finally:
        await trio.to_thread.run_sync(tracer.close)
