"""A small file system for the tests of msharefs.fuse, run as a program: toyfs.py DIRECTORY.

Files live in the root directory; what happens to one is decided by its name:

    region*    opened in passthrough mode, backed by a memfd
    plain*     left to pyfuse3 and the page cache
    stream*    a stream whose reads wait for ever, in the read handler
    slow*      its reads wait for ever in pyfuse3
    refused*   the open is refused by the handler, after pyfuse3 has opened it
    unbacked*  the open names a backing file that the kernel does not take
    crash*     looking it up raises what an operation of pyfuse3 must not raise
    upper*     what is written to it is made upper case, in the write handler
    handmade*  opened in passthrough mode by a handler that answers later

It prints one JSON object when it is ready and one when it has ended; SIGTERM stops it.
"""

# ruff: noqa: ARG002 - the signatures are pyfuse3's
from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import select
import signal
import stat
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from msharefs.fuse import (
    FORWARD,
    Handlers,
    IoctlReply,
    MountError,
    OpenPlan,
    Router,
    Session,
    mount,
)

SUM_NOW = 0xC0105401  # _IOWR('T', 1, 16): two u64 in, their sum and difference out
SUM_LATER = 0xC0105402  # the same, in a task
SLEEP = 0x5403  # waits for ever
RAISE_NOW = 0x5404
RAISE_LATER = 0x5405
TOO_MUCH = 0x80085406  # answers with more than was asked for
STATS = 0x98005407  # _IOR('T', 7, 6144): JSON
FINISHES = 0x5408  # waits, shielded, until told to go on; then returns 7
GO_ON = 0x5409
INVALIDATE = 0x540A  # forget the entry `plain-gone`
WAKE = 0x540C  # whoever polls may read from now on
NONSENSE = 0x540B  # the handler returns what it must not


class Node:
    def __init__(self, ino: int, name: bytes, mode: int) -> None:
        self.ino, self.name, self.mode = ino, name, mode
        self.fd = os.memfd_create(f"toy{ino}", os.MFD_CLOEXEC) if stat.S_ISREG(mode) else -1

    def is_a(self, kind: str) -> bool:
        return self.name.startswith(kind.encode())


class Toy(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = {1: Node(1, b"", stat.S_IFDIR | 0o777)}
        self.names: dict[bytes, int] = {}
        self.open_files: list[int] = []
        self.calls = dict.fromkeys(["open", "release", "read", "write", "forget", "fallocate"], 0)
        self.router: Router | None = None
        self.go_on = trio.Event()
        self.finished = 0
        self.ready = False
        self.poller: pyfuse3.PollHandle | None = None

    # -- the namespace, for pyfuse3 --

    def attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink = node.ino, node.mode, 1
        entry.st_size = os.fstat(node.fd).st_size if node.fd >= 0 else 0
        entry.entry_timeout = 300 if node.is_a("plain") else 0
        entry.attr_timeout = 0
        return entry

    def named(self, name: bytes) -> Node:
        if name not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.nodes[self.names[name]]

    async def lookup(self, parent, name, ctx):
        if name.startswith(b"crash"):
            raise RuntimeError("asked to crash")
        return self.attributes(self.named(name))

    def forget(self, pairs):
        self.calls["forget"] += sum(count for _, count in pairs)

    async def getattr(self, ino, ctx=None):
        return self.attributes(self.nodes[ino])

    async def setattr(self, ino, attr, fields, fh, ctx):
        if fields.update_size:
            os.ftruncate(self.nodes[ino].fd, attr.st_size)
        return self.attributes(self.nodes[ino])

    async def create(self, parent, name, mode, flags, ctx):
        node = Node(max(self.nodes) + 1, name, stat.S_IFREG | (mode & 0o7777))
        self.nodes[node.ino] = node
        self.names[name] = node.ino
        return await self.open(node.ino, flags, ctx), self.attributes(node)

    async def open(self, ino, flags, ctx):
        self.calls["open"] += 1
        self.open_files.append(ino)
        return pyfuse3.FileInfo(fh=ino, direct_io=self.nodes[ino].is_a("slow"))

    async def release(self, fh):
        self.calls["release"] += 1
        self.open_files.remove(fh)

    async def flush(self, fh):
        pass

    async def read(self, fh, off, size):
        self.calls["read"] += 1
        if self.nodes[fh].is_a("slow"):
            await trio.sleep_forever()
        return os.pread(self.nodes[fh].fd, size, off)

    async def write(self, fh, off, buf):
        self.calls["write"] += 1
        return os.pwrite(self.nodes[fh].fd, buf, off)

    async def opendir(self, ino, ctx):
        return ino

    async def readdir(self, fh, start, token):
        for ino in sorted(self.names.values()):
            if ino > start and not pyfuse3.readdir_reply(
                token, self.nodes[ino].name, self.attributes(self.nodes[ino]), ino
            ):
                break

    async def poll(self, ino, fh, ph, ctx):
        self.poller = ph or self.poller
        return select.POLLIN if self.ready else 0

    async def unlink(self, parent, name, ctx):
        del self.names[name]

    async def getxattr(self, ino, name, ctx):
        raise pyfuse3.FUSEError(pyfuse3.ENOATTR)

    # -- the rest, for the router --

    def handlers(self) -> Handlers:
        return Handlers(
            ioctl=self.ioctl,
            fallocate=self.fallocate,
            read=self.read_now,
            write=self.write_now,
            getxattr=self.getxattr_now,
            opened=self.opened,
            errno_of=self.errno_of,
        )

    def ioctl(self, request):
        cmd = request.cmd
        if cmd in (SUM_NOW, SUM_LATER):
            a, b = struct.unpack("<QQ", request.data)
            answer = IoctlReply(3, struct.pack("<QQ", a + b, a - b))
            return answer if cmd == SUM_NOW else self.later(answer)
        if cmd == SLEEP:
            return self.later(None)
        if cmd == RAISE_NOW:
            raise RuntimeError("asked to raise")
        if cmd == RAISE_LATER:
            return self.later(RuntimeError("asked to raise later"))
        if cmd == TOO_MUCH:
            return IoctlReply(0, bytes(9))
        if cmd == STATS:
            return IoctlReply(0, json.dumps(self.stats()).encode().ljust(6144))
        if cmd == FINISHES:
            return self.finishes()
        if cmd == GO_ON:
            self.go_on.set()
            return IoctlReply()
        if cmd == INVALIDATE:
            pyfuse3.invalidate_entry(1, b"plain-gone")
            return IoctlReply()
        if cmd == WAKE:
            self.ready = True
            if self.poller:
                self.poller.notify()
            return IoctlReply()
        if cmd == NONSENSE:
            return 17
        raise OSError(errno.ENOTTY, "no such ioctl")

    async def later(self, answer):
        await trio.lowlevel.checkpoint()
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def finishes(self):
        with trio.CancelScope(shield=True):
            await self.go_on.wait()
        self.finished += 1
        return IoctlReply(7)

    def fallocate(self, request):
        self.calls["fallocate"] += 1
        if request.mode:
            raise OSError(errno.EOPNOTSUPP, "plain allocation only")
        os.ftruncate(self.nodes[request.nodeid].fd, request.offset + request.length)

    def read_now(self, request):
        if not self.nodes[request.nodeid].is_a("stream"):
            return FORWARD
        if request.nonblocking:
            raise OSError(errno.EAGAIN, "nothing yet")
        return self.later(None)

    def write_now(self, request):
        node = self.nodes[request.nodeid]
        if not node.is_a("upper"):
            return FORWARD
        if request.offset >= 1 << 32:
            raise OSError(errno.EFBIG, "too far")
        taken = os.pwrite(node.fd, request.data.upper(), request.offset)
        return self.later(taken - 1) if request.data == b"later" else taken

    def getxattr_now(self, request):
        if request.name == b"user.now":
            return b"a value"
        if request.name == b"user.later":
            return self.later(str(request.pid).encode())
        if request.name == b"user.refused":
            raise OSError(errno.EXFULL, "refused by name")
        return FORWARD

    def opened(self, file):
        node = self.nodes[file.nodeid]
        if node.is_a("region"):
            return OpenPlan(backing_fd=node.fd)
        if node.is_a("stream"):
            return OpenPlan(stream=True)
        if node.is_a("refused"):
            raise OSError(errno.EXFULL, "refused by name")
        if node.is_a("unbacked"):
            return OpenPlan(backing_fd=987654)
        if node.is_a("handmade"):
            return self.later(OpenPlan(backing_fd=node.fd))
        return None

    def errno_of(self, exc, what):
        if isinstance(exc, OSError):
            return exc.errno
        logging.getLogger("toyfs").error("%s", what, exc_info=exc)
        return errno.EIO

    def stats(self) -> dict[str, Any]:
        router = self.router
        assert router is not None
        assert router.connection is not None
        return {
            "calls": self.calls,
            "open_files": len(self.open_files),
            "finished": self.finished,
            "ops": {op.name: count for op, count in router.counts.items()},
            "backing": len(router.backing),
            "waiting": router.waiting,
            "in_flight": router.downstream.in_flight,
            "notifications": [[*key, count] for key, count in router.notifier.errors.items()],
            "offered": router.connection.offered,
            "flags": router.connection.flags,
        }


def descriptors() -> list[str]:
    """What is open in this process, but for the descriptor that lists it."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
            fcntl.fcntl(int(fd.name), fcntl.F_GETFD)
        except OSError:
            continue  # the listing's own
        found.append(target.split(":", maxsplit=1)[0])
    return sorted(found)


async def main(directory: str) -> None:
    toy = Toy()
    device = mount(directory, source="toy")
    session = Session(toy, device, toy.handlers(), mountpoint=directory)
    toy.router = session.router

    async def stop_on_signal(task_status=trio.TASK_STATUS_IGNORED):
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                session.request_stop()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(stop_on_signal)
            await session.run(lambda _: print(json.dumps({"ready": os.getpid()}), flush=True))
            nursery.cancel_scope.cancel()
    finally:
        for node in toy.nodes.values():
            if node.fd >= 0:
                os.close(node.fd)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    before = descriptors()
    status = 0
    try:
        trio.run(main, sys.argv[1])
    except MountError as exc:
        print(exc, file=sys.stderr)
        sys.exit(2)
    except BaseException:
        logging.getLogger("toyfs").exception("ended")
        status = 1
    # Trio keeps its worker threads for a few seconds; they are its own.
    threads = [t.name for t in threading.enumerate() if not t.name.startswith("Trio")]
    after = descriptors()
    leaked = list(after)
    for name in before:
        if name in leaked:
            leaked.remove(name)
    print(json.dumps({"ended": status, "leaked": leaked, "threads": threads}), flush=True)
    sys.exit(status)
