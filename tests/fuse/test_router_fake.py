"""The router between a kernel and a library that are sockets of the test: hostile ones, too."""

from __future__ import annotations

import errno
import logging
import os
import random
import select
import socket
import struct
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from msharefs.fuse import FORWARD, Handlers, IoctlReply, Opcode, OpenPlan, Router
from msharefs.fuse.attributes import Attributes
from msharefs.fuse.downstream import Downstream
from msharefs.fuse.wire import (
    ENTRY_OUT_SIZE,
    FRAME_BUFFER,
    IN_HEADER,
    OPEN_OUT,
    OUT_HEADER,
    OUT_SIZE,
    UNANSWERED,
    InitFlag,
    NotifyCode,
    OpenReplyFlag,
    build_reply,
    build_request,
)

pytestmark = pytest.mark.filterwarnings("error")


class FakeBacking:
    def __init__(self) -> None:
        self.ids: dict[int, int] = {}
        self.next = 1

    def open(self, fd: int) -> int:
        if fd < 0:
            raise OSError(errno.ELOOP, "stacked too deep")
        self.ids[self.next] = fd
        self.next += 1
        return self.next - 1

    def close(self, backing_id: int) -> None:
        del self.ids[backing_id]


def errno_of(exc: BaseException, _what: str) -> int:
    return exc.errno if isinstance(exc, OSError) else errno.EIO


def handlers(**some) -> Handlers:
    given_ones = {
        "ioctl": lambda request: IoctlReply(0, request.data[: request.out_size]),
        "fallocate": lambda _request: None,
        "read": lambda _request: FORWARD,
        "opened": lambda _file: None,
        "errno_of": errno_of,
    }
    return Handlers(**{**given_ones, **some})


class Rig:
    """The router, and the test in the places of the kernel and of the library."""

    def __init__(self, served: Handlers, reply_buffer: int) -> None:
        kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (kernel, device):
            end.setsockopt(socket.SOL_SOCKET, 32, 64 << 20)  # SO_SNDBUFFORCE: a kernel takes all
        device.setblocking(False)
        self.device = device
        self.kernel = trio.socket.from_stdlib_socket(kernel)
        self.backing = FakeBacking()
        self.router = Router(
            device.fileno(),
            served,
            downstream=Downstream(reply_buffer=reply_buffer),
            backing=self.backing,
        )
        fd = int(self.router.downstream.give_away().rpartition("/")[2])
        self.library = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))

    async def ask(self, opcode: int, unique: int, body: bytes = b"", nodeid: int = 1) -> None:
        await self.kernel.send(build_request(Opcode(opcode), unique, nodeid, body))

    async def reply(self) -> tuple[int, int, bytes]:
        """(unique, errno, payload) of the next reply that the kernel gets."""
        frame = await self.kernel.recv(FRAME_BUFFER)
        length, error, unique = OUT_HEADER.unpack_from(frame)
        assert length == len(frame)
        assert -511 <= error <= 0
        return unique, -error, frame[OUT_SIZE:]

    async def forwarded(self) -> tuple[Opcode, int, bytes]:
        """(opcode, unique, body) of the next request that the library gets."""
        frame = await self.library.recv(FRAME_BUFFER)
        return Opcode(IN_HEADER.unpack_from(frame)[1]), IN_HEADER.unpack_from(frame)[2], frame[40:]

    async def nothing_more(self) -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        for end in (self.kernel, self.library):
            with pytest.raises(BlockingIOError):
                socket.socket.recv(end._sock, 1)

    async def initialise(self) -> None:
        offered = InitFlag.INIT_EXT | InitFlag.PASSTHROUGH
        words = (7, 44, 0, offered & 0xFFFF_FFFF, offered >> 32)
        await self.ask(Opcode.INIT, 2, struct.pack("<IIIII44x", *words))
        opcode, unique, _ = await self.forwarded()
        assert (opcode, unique) == (Opcode.INIT, 2)
        await self.library.send(build_reply(2, struct.pack("<IIIIHHI40x", 7, 31, 0, 0, 0, 0, 4096)))
        assert (await self.reply())[:2] == (2, 0)
        assert self.router.ready.is_set()


@asynccontextmanager
async def rig(served: Handlers | None = None, *, reply_buffer: int = 4 << 20):
    one = Rig(served or handlers(), reply_buffer)
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.router.run)
                yield one
                one.router.stop()
        assert one.router.waiting == 0
        await one.router.notifier.aclose()
    finally:
        one.router.downstream.close()
        one.device.close()
        one.kernel.close()
        one.library.close()


def read_body(size: int, fh: int = 0) -> bytes:
    return struct.pack("<QQIIQII", fh, 0, size, 0, 0, 0, 0)


def ioctl_body(cmd: int, data: bytes = b"", out_size: int = 0) -> bytes:
    return struct.pack("<QIIQII", 0, 0, cmd, 0, len(data), out_size) + data


OPEN_BODY = struct.pack("<II", os.O_RDWR, 0)
CREATE_BODY = struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0) + b"new\0"


def open_answer(unique: int, fh: int, child: int | None = None) -> bytes:
    entry = b"" if child is None else struct.pack("<Q", child).ljust(ENTRY_OUT_SIZE, b"\0")
    return build_reply(unique, entry + OPEN_OUT.pack(fh, OpenReplyFlag.KEEP_CACHE, 0))


# -- whatever comes -----------------------------------------------------------------------------

BODIES = {
    Opcode.GETATTR: bytes(16),
    Opcode.LOOKUP: b"name\0",
    Opcode.OPEN: OPEN_BODY,
    Opcode.CREATE: CREATE_BODY,
    Opcode.READ: read_body(4096),
    Opcode.READDIRPLUS: read_body(0xFFFF_FFFF),
    Opcode.RELEASE: bytes(24),
    Opcode.FALLOCATE: bytes(32),
    Opcode.FORGET: bytes(8),
    Opcode.BATCH_FORGET: bytes(8),
    Opcode.POLL: bytes(24),
    Opcode.WRITE: read_body(3) + b"abc",
    Opcode.STATX: b"whatever",
}


@st.composite
def storm(draw) -> list[bytes]:
    """Frames with numbers of their own, whole, damaged or of no known kind, and interrupts."""
    frames = []
    for index in range(draw(st.integers(1, 40))):
        unique = 2 * index + 2
        kind = draw(st.sampled_from(["whole", "ioctl", "interrupt", "damaged", "unknown", "noise"]))
        if kind == "noise":
            # Numbered 0: nobody waits, whatever else it says.
            raw = bytearray(draw(st.binary(max_size=120)))
            raw[8:16] = bytes(8)[: max(0, len(raw) - 8)]
            frames.append(bytes(raw[:7]) if len(raw) < 16 else bytes(raw))
        elif kind == "unknown":
            body = draw(st.binary(max_size=20))
            code = draw(st.sampled_from([0, 7, 19, 53, 4096, 2**32 - 1]))
            frames.append(IN_HEADER.pack(40 + len(body), code, unique, 1, 0, 0, 0, 0, 0) + body)
        elif kind == "interrupt":
            target = 2 * draw(st.integers(0, 41))
            body = struct.pack("<Q", target)
            frames.append(build_request(Opcode.INTERRUPT, unique + 1, 1, body))
        elif kind == "ioctl":
            body = ioctl_body(draw(st.integers(0, 7)), draw(st.binary(max_size=9)), 4)
            frames.append(build_request(Opcode.IOCTL, unique, 1, body))
        else:
            opcode = draw(st.sampled_from(list(BODIES)))
            frame = build_request(opcode, unique, 1, BODIES[opcode])
            if kind == "damaged":
                frame = frame[:-1] if draw(st.booleans()) else frame + b"?"
            frames.append(frame)
    return frames


async def wild_ioctl(cmd: int) -> object:
    await trio.lowlevel.checkpoint()
    if cmd == 1:
        raise RuntimeError("a bug")
    if cmd == 2:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            raise OSError(errno.EXDEV, "in a group")
    return IoctlReply() if cmd == 3 else b"nonsense"


def wild_sync(request):
    """Each way in which a handler can answer, or fail to, by command."""
    if request.cmd == 5:
        raise ValueError("a bug")
    if request.cmd == 6:
        return 17
    if request.cmd == 7:
        return IoctlReply(0, bytes(100))
    return wild_ioctl(request.cmd) if request.cmd else IoctlReply(1)


def wild_opened(file):
    if file.fh % 3 == 0:
        raise RuntimeError("a bug")
    return OpenPlan(backing_fd=1) if file.fh % 3 == 1 else "nonsense"


async def wild_library(end, seed: int) -> None:
    """Answers everything in the end: well, with an error, or with what is no answer at all."""
    rng = random.Random(seed)
    while True:
        frame = await end.recv(FRAME_BUFFER)
        _len, opcode, unique, *_ = IN_HEADER.unpack_from(frame)
        if opcode in UNANSWERED:
            continue
        how = rng.randrange(6)
        if how == 0:
            await end.send(b"short")
            await end.send(struct.pack("<IiQ", 9999, 0, unique))  # lies about its length
        elif how == 1:
            await end.send(build_reply(unique + 2**40))  # a stranger's, then its own
            await end.send(build_reply(unique, error=errno.ENOENT))
        elif how == 2 and opcode in (Opcode.OPEN, Opcode.CREATE):
            child = 5 if opcode == Opcode.CREATE else None
            await end.send(open_answer(unique, rng.randrange(9), child))
        elif how == 3:
            await end.send(struct.pack("<IiQ", 16, NotifyCode.POLL, 0))
            await end.send(build_reply(unique, b"x" * rng.randrange(64)))
        else:
            await end.send(build_reply(unique))


@given(storm(), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
async def test_no_frame_ends_the_loop_and_each_request_gets_one_reply(frames, seed):
    # What is logged about the damage is many lines a run; the counting below is the test.
    logging.getLogger("msharefs.fuse").setLevel(logging.CRITICAL + 1)
    expected = {
        IN_HEADER.unpack_from(frame)[2]
        for frame in frames
        if len(frame) >= 40 and IN_HEADER.unpack_from(frame)[1] not in UNANSWERED
    } - {0}
    try:
        async with (
            rig(handlers(ioctl=wild_sync, opened=wild_opened)) as one,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(wild_library, one.library, seed)
            for frame in frames:
                await one.kernel.send(frame) if frame else None
            last = 2**30
            await one.ask(Opcode.GETATTR, last, bytes(16))
            seen: Counter[int] = Counter()
            while set(seen) != expected | {last}:
                frame = await one.kernel.recv(FRAME_BUFFER)
                length, error, unique = OUT_HEADER.unpack_from(frame)
                assert length == len(frame)
                if unique:
                    assert -511 <= error <= 0
                    seen[unique] += 1
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert set(seen.values()) == {1}
            assert one.router.downstream.in_flight == 0
            nursery.cancel_scope.cancel()
    finally:
        logging.getLogger("msharefs.fuse").setLevel(logging.NOTSET)


# -- answers of the handlers --------------------------------------------------------------------


async def test_a_handler_that_returns_answers_at_once():
    async with rig() as one:
        await one.ask(Opcode.IOCTL, 2, ioctl_body(1, b"abcd", 4))
        assert await one.reply() == (2, 0, struct.pack("<iIII", 0, 0, 0, 0) + b"abcd")
        await one.ask(Opcode.FALLOCATE, 4, bytes(32))
        assert await one.reply() == (4, 0, b"")
        await one.nothing_more()
        assert one.router.counts == {Opcode.IOCTL: 1, Opcode.FALLOCATE: 1}


async def test_an_interrupt_cancels_a_handler_that_waits():
    async def wait(_request):
        await trio.sleep_forever()

    async with rig(handlers(ioctl=wait, read=wait, fallocate=wait)) as one:
        for unique, opcode, body in (
            (2, Opcode.IOCTL, ioctl_body(1)),
            (4, Opcode.READ, read_body(10)),
            (6, Opcode.FALLOCATE, bytes(32)),
        ):
            await one.ask(opcode, unique, body)
            await trio.testing.wait_all_tasks_blocked()
            assert one.router.waiting == 1
            await one.ask(Opcode.INTERRUPT, unique + 1, struct.pack("<Q", unique))
            assert await one.reply() == (unique, errno.EINTR, b"")
        # Late, doubled or unknown ones do nothing.
        for unique in (2, 4, 999):
            await one.ask(Opcode.INTERRUPT, unique + 1, struct.pack("<Q", unique))
        await one.nothing_more()


async def test_a_handler_that_finishes_in_spite_of_an_interrupt_is_heard():
    go_on = trio.Event()

    async def shielded(_request):
        with trio.CancelScope(shield=True):
            await go_on.wait()
        return IoctlReply(5)

    async with rig(handlers(ioctl=shielded)) as one:
        await one.ask(Opcode.IOCTL, 2, ioctl_body(1))
        await one.ask(Opcode.INTERRUPT, 3, struct.pack("<Q", 2))
        await one.nothing_more()
        go_on.set()
        unique, error, payload = await one.reply()
        assert (unique, error, payload[:4]) == (2, 0, struct.pack("<i", 5))
        await one.nothing_more()


async def test_a_broken_errno_boundary_is_eio(caplog):
    def broken(_exc, _what):
        raise RuntimeError("broken")

    def nonsense(_request):
        return "nonsense"

    async with rig(handlers(ioctl=nonsense, fallocate=nonsense, errno_of=broken)) as one:
        await one.ask(Opcode.IOCTL, 2, ioctl_body(1))
        assert (await one.reply())[:2] == (2, errno.EIO)
        await one.ask(Opcode.FALLOCATE, 4, bytes(32))
        assert (await one.reply())[:2] == (4, errno.EIO)
    assert "errno_of failed" in caplog.text
    async with rig(handlers(ioctl=nonsense, errno_of=lambda *_: -5)) as one:
        await one.ask(Opcode.IOCTL, 2, ioctl_body(1))
        assert (await one.reply())[:2] == (2, errno.EIO)


async def test_a_thousand_readers_wait_and_nothing_else_does():
    async def wait(_request):
        await trio.sleep_forever()

    def read(request):
        return wait(request) if request.fh == 1 else b"now"

    async with rig(handlers(read=read)) as one:
        for index in range(1000):
            await one.ask(Opcode.READ, 2 * index + 2, read_body(131072, fh=1))
        await trio.testing.wait_all_tasks_blocked()
        assert one.router.waiting == 1000
        assert one.router.downstream.in_flight == 0
        await one.ask(Opcode.READ, 9000, read_body(100, fh=2))
        assert await one.reply() == (9000, 0, b"now")
        await one.ask(Opcode.GETATTR, 9002, bytes(16))
        assert (await one.forwarded())[:2] == (Opcode.GETATTR, 9002)
        await one.library.send(build_reply(9002, b"attributes"))
        assert await one.reply() == (9002, 0, b"attributes")
        for index in range(500):
            await one.ask(Opcode.INTERRUPT, 2 * index + 3, struct.pack("<Q", 2 * index + 2))
        answered = {(await one.reply())[:2] for _ in range(500)}
        assert answered == {(2 * index + 2, errno.EINTR) for index in range(500)}
        one.router.stop()
        answered = {(await one.reply())[:2] for _ in range(500)}
        assert answered == {(2 * i + 2, errno.ECONNABORTED) for i in range(500, 1000)}


@pytest.mark.parametrize(
    ("value", "error", "payload"),
    [
        (3, 0, struct.pack("<II", 3, 0)),
        (0, 0, bytes(8)),
        (4, errno.EIO, b""),
        (-1, errno.EIO, b""),
        ("nonsense", errno.EIO, b""),
        (FORWARD, errno.EXDEV, b""),
    ],
)
@pytest.mark.parametrize("later", [False, True])
async def test_a_write_is_answered_by_its_handler(value, error, payload, later):
    async def answer_later():
        await trio.lowlevel.checkpoint()
        return value

    later = later and value is not FORWARD
    async with rig(handlers(write=lambda _: answer_later() if later else value)) as one:
        await one.ask(Opcode.WRITE, 2, read_body(3) + b"abc")
        if value is FORWARD:
            assert (await one.forwarded())[:2] == (Opcode.WRITE, 2)
            await one.library.send(build_reply(2, error=errno.EXDEV))
        assert await one.reply() == (2, error, payload)
        await one.nothing_more()


async def test_a_reply_longer_than_asked_for_is_eio():
    async with rig(handlers(read=lambda _: bytes(11), ioctl=lambda _: IoctlReply(0, b"1"))) as one:
        await one.ask(Opcode.READ, 2, read_body(10))
        assert (await one.reply())[:2] == (2, errno.EIO)
        await one.ask(Opcode.IOCTL, 4, ioctl_body(1, b"", 0))
        assert (await one.reply())[:2] == (4, errno.EIO)


# -- the library --------------------------------------------------------------------------------


async def test_an_interrupted_read_that_the_library_holds_is_given_up():
    async with rig() as one:
        await one.ask(Opcode.READ, 2, read_body(100))
        assert (await one.forwarded())[:2] == (Opcode.READ, 2)
        await one.ask(Opcode.INTERRUPT, 3, struct.pack("<Q", 2))
        assert await one.reply() == (2, errno.EINTR, b"")
        assert one.router.downstream.in_flight > 0  # the library may still answer
        await one.library.send(build_reply(2, b"late"))
        await one.nothing_more()
        assert one.router.downstream.in_flight == 0


async def test_an_interrupted_read_that_the_library_answers_soon_is_not_disturbed():
    async with rig() as one:
        await one.ask(Opcode.READ, 2, read_body(100))
        await one.forwarded()
        await one.ask(Opcode.INTERRUPT, 3, struct.pack("<Q", 2))
        await trio.testing.wait_all_tasks_blocked()
        await one.library.send(build_reply(2, b"data"))
        assert await one.reply() == (2, 0, b"data")
        await one.nothing_more()


async def test_an_interrupt_is_never_forwarded():
    async with rig() as one:
        await one.ask(Opcode.LOOKUP, 2, b"name\0")
        await one.forwarded()
        await one.ask(Opcode.INTERRUPT, 3, struct.pack("<Q", 2))
        await one.nothing_more()
        await one.library.send(build_reply(2, error=errno.ENOENT))
        assert await one.reply() == (2, errno.ENOENT, b"")


async def test_replies_never_fill_the_socket():
    """The library answers all it holds without once giving us the loop. If the budget were wrong,
    it would wait for ever, holding the loop; here, where it does not wait, it fails.
    """
    size, count = 131072, 400
    async with rig(reply_buffer=2 << 20) as one:
        downstream = one.router.downstream
        for index in range(count):
            await one.ask(Opcode.READ, 2 * index + 2, read_body(size))
        await trio.testing.wait_all_tasks_blocked()
        assert downstream.backlog > 0
        # Requests that are answered here do not wait for the library.
        await one.ask(Opcode.IOCTL, 9000, ioctl_body(1))
        assert (await one.reply())[:2] == (9000, 0)
        answered: set[int] = set()
        while len(answered) < count:
            assert 0 < downstream.in_flight <= downstream.budget
            held = []
            while True:
                try:
                    frame = socket.socket.recv(one.library._sock, FRAME_BUFFER)
                except BlockingIOError:
                    break
                held.append(IN_HEADER.unpack_from(frame)[2])
            for unique in held:
                socket.socket.send(one.library._sock, build_reply(unique, bytes(size)))
            for _ in held:
                unique, error, payload = await one.reply()
                assert (error, len(payload)) == (0, size)
                answered.add(unique)
            await trio.testing.wait_all_tasks_blocked()
        assert answered == {2 * index + 2 for index in range(count)}
        assert downstream.in_flight == 0
        assert downstream.backlog == 0


async def test_one_request_worth_more_than_the_budget_still_passes():
    async with rig(reply_buffer=4096) as one:
        for unique in (2, 4):
            await one.ask(Opcode.READDIR, unique, read_body(1 << 20))
        assert (await one.forwarded())[1] == 2
        await one.nothing_more()
        await one.library.send(build_reply(2, b"a"))
        assert (await one.reply())[0] == 2
        assert (await one.forwarded())[1] == 4
        await one.library.send(build_reply(4, b"b"))
        assert (await one.reply())[0] == 4


async def test_requests_keep_their_order_in_the_backlog_and_can_be_withdrawn():
    async with rig(reply_buffer=4096) as one:
        await one.ask(Opcode.READ, 2, read_body(1 << 20))
        await one.ask(Opcode.READ, 4, read_body(1 << 20))
        await one.ask(Opcode.FORGET, 6, bytes(8))
        await one.ask(Opcode.LOOKUP, 8, b"name\0")
        assert (await one.forwarded())[1] == 2
        await one.nothing_more()
        await one.ask(Opcode.INTERRUPT, 5, struct.pack("<Q", 4))
        assert await one.reply() == (4, errno.EINTR, b"")
        assert (await one.forwarded())[:2] == (Opcode.FORGET, 6)
        await one.nothing_more()
        await one.library.send(build_reply(2, b"done"))
        assert (await one.reply())[0] == 2
        assert (await one.forwarded())[:2] == (Opcode.LOOKUP, 8)
        await one.library.send(build_reply(8, error=errno.ENOENT))
        assert (await one.reply())[0] == 8


async def test_requests_wait_while_the_library_does_not_read():
    async with rig() as one:
        body = read_body(100_000) + bytes(100_000)
        for index in range(300):  # more than the socket holds
            await one.ask(Opcode.WRITE, 2 * index + 2, body)
        await trio.testing.wait_all_tasks_blocked()
        assert one.router.downstream.backlog > 0
        await one.ask(Opcode.IOCTL, 9000, ioctl_body(1))
        assert (await one.reply())[:2] == (9000, 0)
        for index in range(300):
            assert (await one.forwarded())[1] == 2 * index + 2
            await one.library.send(build_reply(2 * index + 2, bytes(8)))
            assert (await one.reply())[0] == 2 * index + 2


async def test_the_death_of_the_library_fails_its_requests_only(caplog):
    async with rig() as one:
        await one.ask(Opcode.GETATTR, 2, bytes(16))
        await one.forwarded()
        one.library.close()
        assert await one.reply() == (2, errno.EIO, b"")
        await one.ask(Opcode.GETATTR, 4, bytes(16))
        assert await one.reply() == (4, errno.EIO, b"")
        await one.ask(Opcode.IOCTL, 6, ioctl_body(1))
        assert (await one.reply())[:2] == (6, 0)
    assert not caplog.records


async def test_notifications_reach_the_kernel():
    async with rig() as one:
        for code in (NotifyCode.POLL, NotifyCode.INVAL_INODE, NotifyCode.STORE):
            await one.library.send(struct.pack("<IiQ8x", 24, code, 0))
            frame = await one.kernel.recv(FRAME_BUFFER)
            assert OUT_HEADER.unpack_from(frame) == (24, code, 0)


async def test_an_init_that_fails_ends_the_router():
    one = Rig(handlers(), 1 << 20)
    failures = []

    async def run():
        try:
            await one.router.run()
        except OSError as exc:
            failures.append(exc)

    try:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await one.ask(Opcode.INIT, 2, struct.pack("<IIII", 7, 44, 0, 0))
                await one.forwarded()
                await one.library.send(build_reply(2, error=errno.EPROTO))
                assert await one.reply() == (2, errno.EPROTO, b"")
        assert one.router.connection is None
        assert "do not agree" in str(failures[0])
    finally:
        one.router.downstream.close()
        for end in (one.device, one.kernel, one.library):
            end.close()


async def test_the_end_of_the_connection_ends_the_router():
    one = Rig(handlers(), 1 << 20)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.router.run)
            await one.ask(Opcode.IOCTL, 2, ioctl_body(1))
            assert (await one.reply())[:2] == (2, 0)
            one.kernel.close()
    assert one.router.gone is not None
    assert one.router.ended.is_set()
    one.router.downstream.close()
    one.device.close()
    one.library.close()


# -- files that have been opened ----------------------------------------------------------------


def plan_by_node(file):
    plans = {
        1: OpenPlan(backing_fd=10),
        2: OpenPlan(stream=True),
        3: None,
        4: OpenPlan(direct_io=False, noflush=True),
        5: OpenPlan(backing_fd=11, parallel=True),
    }
    return plans[file.nodeid]


@pytest.mark.parametrize(
    ("nodeid", "flags", "backing"),
    [
        (1, OpenReplyFlag.PASSTHROUGH | OpenReplyFlag.DIRECT_IO, 1),
        (2, OpenReplyFlag.STREAM | OpenReplyFlag.DIRECT_IO, 0),
        (3, OpenReplyFlag.KEEP_CACHE, 0),
        (4, OpenReplyFlag.NOFLUSH, 0),
        (
            5,
            OpenReplyFlag.PASSTHROUGH
            | OpenReplyFlag.DIRECT_IO
            | OpenReplyFlag.PARALLEL_DIRECT_WRITES,
            1,
        ),
    ],
)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("create", [False, True])
async def test_an_open_is_answered_as_planned(nodeid, flags, backing, later, create):
    async def plan_later(file):
        await trio.lowlevel.checkpoint()
        return plan_by_node(file)

    async with rig(handlers(opened=plan_later if later else plan_by_node)) as one:
        await one.initialise()
        if create:
            await one.ask(Opcode.CREATE, 4, CREATE_BODY, nodeid=77)
        else:
            await one.ask(Opcode.OPEN, 4, OPEN_BODY, nodeid)
        await one.forwarded()
        await one.library.send(open_answer(4, 99, nodeid if create else None))
        unique, error, payload = await one.reply()
        assert (unique, error) == (4, 0)
        assert OPEN_OUT.unpack(payload[-OPEN_OUT.size :]) == (99, flags, backing)
        assert len(one.backing.ids) == (1 if backing else 0)
        await one.ask(Opcode.RELEASE, 6, struct.pack("<QIIQ", 99, 0, 0, 0), nodeid)
        assert (await one.forwarded())[:2] == (Opcode.RELEASE, 6)
        assert not one.backing.ids
        await one.library.send(build_reply(6))
        assert await one.reply() == (6, 0, b"")


async def test_a_node_has_one_backing_id_while_it_is_open_anywhere():
    async with rig(handlers(opened=plan_by_node)) as one:
        await one.initialise()
        for index, fh in enumerate((5, 6, 5)):
            unique = 4 + 2 * index
            await one.ask(Opcode.OPEN, unique, OPEN_BODY)
            await one.forwarded()
            await one.library.send(open_answer(unique, fh))
            assert OPEN_OUT.unpack((await one.reply())[2])[2] == 1
        for index, (fh, left) in enumerate(((5, 1), (77, 1), (6, 1), (5, 0), (5, 0))):
            await one.ask(Opcode.RELEASE, 20 + 2 * index, struct.pack("<QIIQ", fh, 0, 0, 0))
            await one.forwarded()
            assert len(one.backing.ids) == left
            await one.library.send(build_reply(20 + 2 * index))
            await one.reply()


def refuse(_file):
    raise OSError(errno.EACCES, "not you")


async def refuse_later(_file):
    await trio.lowlevel.checkpoint()
    raise OSError(errno.EACCES, "not you")


@pytest.mark.parametrize(
    ("opened", "error"),
    [
        (refuse, errno.EACCES),
        (refuse_later, errno.EACCES),
        (lambda _: OpenPlan(backing_fd=-1), errno.ELOOP),
        (lambda _: "nonsense", errno.EIO),
    ],
)
@pytest.mark.parametrize("create", [False, True])
async def test_an_open_that_is_refused_is_closed_in_the_library(opened, error, create):
    async with rig(handlers(opened=opened)) as one:
        await one.initialise()
        if create:
            await one.ask(Opcode.CREATE, 4, CREATE_BODY, nodeid=1)
        else:
            await one.ask(Opcode.OPEN, 4, OPEN_BODY, nodeid=8)
        await one.forwarded()
        await one.library.send(open_answer(4, 42, 8 if create else None))
        assert await one.reply() == (4, error, b"")
        opcode, unique, body = await one.forwarded()
        assert (opcode, struct.unpack_from("<Q", body)) == (Opcode.RELEASE, (42,))
        assert unique % 2 == 1
        if create:
            opcode, _, body = await one.forwarded()
            assert (opcode, struct.unpack_from("<Q", body)) == (Opcode.FORGET, (1,))
        await one.library.send(build_reply(unique))
        await one.nothing_more()
        assert not one.backing.ids
        assert one.router.downstream.in_flight == 0


async def test_an_interrupted_open_is_closed_in_the_library():
    async def wait(_file):
        await trio.sleep_forever()

    async with rig(handlers(opened=wait)) as one:
        await one.initialise()
        await one.ask(Opcode.OPEN, 4, OPEN_BODY)
        await one.forwarded()
        await one.library.send(open_answer(4, 42))
        await trio.testing.wait_all_tasks_blocked()
        await one.ask(Opcode.INTERRUPT, 5, struct.pack("<Q", 4))
        assert await one.reply() == (4, errno.EINTR, b"")
        assert (await one.forwarded())[0] is Opcode.RELEASE


async def test_without_passthrough_a_plan_with_a_backing_file_fails():
    async with rig(handlers(opened=plan_by_node)) as one:
        await one.ask(Opcode.OPEN, 4, OPEN_BODY)
        await one.forwarded()
        await one.library.send(open_answer(4, 42))
        assert await one.reply() == (4, errno.EOPNOTSUPP, b"")


def test_a_stream_with_a_backing_file_is_no_plan():
    with pytest.raises(ValueError, match="stream"):
        OpenPlan(backing_fd=1, stream=True)


@pytest.mark.parametrize(
    ("value", "size", "error", "payload"),
    [
        (b"value", 64, 0, b"value"),
        (b"value", 5, 0, b"value"),
        (b"value", 4, errno.ERANGE, b""),
        (b"value", 0, 0, struct.pack("<II", 5, 0)),
        (b"", 64, 0, b""),
        (b"", 0, 0, bytes(8)),
        (OSError(errno.ENODATA, "no such attribute"), 64, errno.ENODATA, b""),
        (OSError(errno.ENODATA, "no such attribute"), 0, errno.ENODATA, b""),
        (7, 64, errno.EIO, b""),
        (None, 64, errno.EIO, b""),
        (FORWARD, 64, errno.EXDEV, b""),
    ],
)
@pytest.mark.parametrize("later", [False, True])
async def test_getxattr_is_answered_by_its_handler(value, size, error, payload, later):
    asked = []

    async def answer_later():
        await trio.lowlevel.checkpoint()
        return answer()

    def answer():
        if isinstance(value, Exception):
            raise value
        return value

    def getxattr(request):
        asked.append((request.name, request.size, request.nodeid))
        return answer_later() if later and value is not FORWARD else answer()

    async with rig(handlers(getxattr=getxattr)) as one:
        await one.ask(Opcode.GETXATTR, 2, struct.pack("<II", size, 0) + b"user.name\0", nodeid=9)
        if value is FORWARD:
            assert (await one.forwarded())[:2] == (Opcode.GETXATTR, 2)
            await one.library.send(build_reply(2, error=errno.EXDEV))
        assert await one.reply() == (2, error, payload)
        await one.nothing_more()
    assert asked == [(b"user.name", size, 9)]


FSYNC = (Opcode.FSYNC, "fsync", struct.pack("<QII", 3, 1, 0))
SEEK = (Opcode.LSEEK, "seek", struct.pack("<QQII", 3, 10, 4, 0))
COPY = (Opcode.COPY_FILE_RANGE, "copy", struct.pack("<QQQQQQQ", 3, 10, 8, 4, 20, 30, 0))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("kind", "value", "error", "payload"),
    [
        (FSYNC, None, 0, b""),
        (FSYNC, FORWARD, errno.EXDEV, b""),
        (FSYNC, 1, errno.EIO, b""),
        (SEEK, 4096, 0, struct.pack("<Q", 4096)),
        (SEEK, FORWARD, errno.EXDEV, b""),
        (SEEK, -1, errno.EIO, b""),
        (SEEK, b"4096", errno.EIO, b""),
        (COPY, 30, 0, struct.pack("<II", 30, 0)),
        (COPY, 0, 0, struct.pack("<II", 0, 0)),
        (COPY, FORWARD, errno.EXDEV, b""),
        (COPY, 31, errno.EIO, b""),
        (COPY, None, errno.EIO, b""),
    ],
)
async def test_fsync_seek_and_copy_are_answered_by_their_handlers(
    kind, value, error, payload, later
):
    opcode, name, body = kind
    asked = []

    async def answer_later():
        await trio.lowlevel.checkpoint()
        return value

    def handler(request):
        asked.append(request)
        return answer_later() if later and value is not FORWARD else value

    async with rig(handlers(**{name: handler})) as one:
        await one.ask(opcode, 2, body, nodeid=9)
        if value is FORWARD:
            assert (await one.forwarded())[:2] == (opcode, 2)
            await one.library.send(build_reply(2, error=errno.EXDEV))
        assert await one.reply() == (2, error, payload)
        await one.nothing_more()
    assert [(found.nodeid, found.fh) for found in asked] == [(9, 3)]
    assert [getattr(found, "offset", 10) for found in asked] == [10]


@pytest.mark.parametrize(
    ("value", "error", "payload"),
    [
        (0, 0, struct.pack("<II", 0, 0)),
        (select.POLLIN, 0, struct.pack("<II", select.POLLIN, 0)),
        (FORWARD, errno.EXDEV, b""),
        (-1, errno.EIO, b""),
        (None, errno.EIO, b""),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_poll_is_answered_by_its_handler_and_woken_by_its_number(
    value, error, payload, waits
):
    asked = []

    def poll(request, wake):
        asked.append((request.nodeid, request.fh, wake))
        return value

    async with rig(handlers(poll=poll)) as one:
        await one.ask(Opcode.POLL, 2, struct.pack("<QQII", 3, 77, int(waits), 1), nodeid=9)
        if value is FORWARD:
            assert (await one.forwarded())[:2] == (Opcode.POLL, 2)
            await one.library.send(build_reply(2, error=errno.EXDEV))
        assert await one.reply() == (2, error, payload)
        ((nodeid, fh, wake),) = asked
        assert (nodeid, fh, wake is not None) == (9, 3, waits)
        if wake is not None:
            wake()
            frame = await one.kernel.recv(FRAME_BUFFER)
            assert frame == struct.pack("<IiQQ", 24, NotifyCode.POLL, 0, 77)
        await one.nothing_more()


# -- names, attributes, opening and closing -------------------------------------------------------

FOUND = Attributes(
    9, 0o100644, 1, 5, 6, 4096, 8, 512, -1, 7 * 10**9 + 3, 0, 2 * 10**9, 1_000_000_001
)
ATTR = struct.pack(
    "<QQQqQQIIIIIIIIII", 9, 4096, 8, -1, 7, 0, 10**9 - 1, 3, 0, 0o100644, 1, 5, 6, 0, 512, 0
)
ENTRY = struct.pack("<QQQQII", 9, 0, 2, 1, 0, 1) + ATTR
LOOKUP = (Opcode.LOOKUP, "lookup", b"name\0")
GETATTR = (Opcode.GETATTR, "getattr", bytes(16))
MAKE = (Opcode.CREATE, "create", CREATE_BODY)
OPEN = (Opcode.OPEN, "open", OPEN_BODY)
UNLINK = (Opcode.UNLINK, "unlink", b"name\0")
RELEASE = (Opcode.RELEASE, "released", struct.pack("<QIIQ", 42, 0, 0, 0))
DENIED = OSError(errno.EACCES, "not you")


@pytest.mark.parametrize(
    ("kind", "value", "error", "payload"),
    [
        (LOOKUP, FOUND, 0, ENTRY),
        (LOOKUP, DENIED, errno.EACCES, b""),
        (LOOKUP, None, errno.EIO, b""),
        (GETATTR, FOUND, 0, struct.pack("<QII", 1, 1, 0) + ATTR),
        (GETATTR, DENIED, errno.EACCES, b""),
        (GETATTR, 9, errno.EIO, b""),
        (MAKE, (FOUND, 42), 0, ENTRY + OPEN_OUT.pack(42, 0, 0)),
        (MAKE, DENIED, errno.EACCES, b""),
        (OPEN, 42, 0, OPEN_OUT.pack(42, 0, 0)),
        (OPEN, DENIED, errno.EACCES, b""),
        (OPEN, "42", errno.EIO, b""),
        (UNLINK, None, 0, b""),
        (UNLINK, DENIED, errno.EACCES, b""),
        (RELEASE, None, 0, b""),
        *((kind, FORWARD, errno.EXDEV, b"") for kind in (LOOKUP, GETATTR, MAKE, OPEN, UNLINK)),
        (RELEASE, FORWARD, errno.EXDEV, b""),
        (RELEASE, DENIED, errno.EXDEV, b""),
    ],
)
async def test_names_and_opens_are_answered_by_their_handlers(kind, value, error, payload):
    opcode, name, body = kind
    asked = []

    def handler(request):
        asked.append(request)
        if isinstance(value, Exception):
            raise value
        return value

    async with rig(handlers(**{name: handler})) as one:
        await one.ask(opcode, 2, body, nodeid=9)
        if error == errno.EXDEV:
            assert (await one.forwarded())[:2] == (opcode, 2)
            await one.library.send(build_reply(2, error=errno.EXDEV))
        assert await one.reply() == (2, error, payload)
        await one.nothing_more()
    assert len(asked) == 1


@pytest.mark.parametrize("create", [False, True])
async def test_an_open_that_was_answered_here_is_closed_if_it_is_refused(create):
    async with rig(handlers(opened=refuse, open=lambda _: 42, create=lambda _: (FOUND, 42))) as one:
        if create:
            await one.ask(Opcode.CREATE, 4, CREATE_BODY, nodeid=1)
        else:
            await one.ask(Opcode.OPEN, 4, OPEN_BODY, nodeid=9)
        assert await one.reply() == (4, errno.EACCES, b"")
        opcode, _, body = await one.forwarded()
        assert (opcode, struct.unpack_from("<Q", body)) == (Opcode.RELEASE, (42,))
        if create:
            opcode, _, body = await one.forwarded()
            assert (opcode, struct.unpack_from("<Q", body)) == (Opcode.FORGET, (1,))
        await one.nothing_more()


async def test_what_is_forgotten_is_told_once():
    told = []
    async with rig(handlers(forget=told.append)) as one:
        await one.ask(Opcode.FORGET, 2, struct.pack("<Q", 3), nodeid=9)
        await one.ask(Opcode.BATCH_FORGET, 4, struct.pack("<IIQQQQ", 2, 0, 9, 3, 10, 1), nodeid=0)
        await one.nothing_more()
    assert told == [[(9, 3)], [(9, 3), (10, 1)]]


async def test_a_reference_that_the_kernel_did_not_take_is_forgotten():
    told = []

    async with rig(
        handlers(lookup=lambda _: one.kernel.close() or FOUND, forget=told.append)
    ) as one:
        await one.ask(Opcode.LOOKUP, 2, b"name\0")
        await one.router.ended.wait()
    assert told == [[(9, 1)]]
