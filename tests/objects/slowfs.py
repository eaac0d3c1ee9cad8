"""A filesystem with one file, ``object``, that waits or fails when told to.

    python slowfs.py MOUNTPOINT

Commands on standard input, each answered by a line on standard output: ``hang OP`` (that operation
waits from now on; a line ``waits OP`` tells of each that does), ``go`` (nothing waits any more),
``fail OP ERRNO``, ``well`` (nothing fails any more), ``fill SIZE LETTER``. It ends when unmounted. OP is getattr, open, read, write or fsync.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

INO = 2


def say(*words: object) -> None:
    print(*words, flush=True)


class Slow(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray()
        self.hanging: set[str] = set()
        self.failing: dict[str, int] = {}
        self.go = trio.Event()

    async def begin(self, op: str) -> None:
        if op in self.hanging:
            say("waits", op)
            await self.go.wait()
        if op in self.failing:
            raise pyfuse3.FUSEError(self.failing[op])

    def attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_nlink = ino, 1
        entry.st_mode = stat.S_IFREG | 0o666 if ino == INO else stat.S_IFDIR | 0o777
        entry.st_size = len(self.content) if ino == INO else 0
        entry.entry_timeout, entry.attr_timeout = 300, 0
        return entry

    async def lookup(self, _parent, name, _ctx):
        if name != b"object":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(INO)

    async def getattr(self, ino, _ctx):
        if ino == INO:
            await self.begin("getattr")
        return self.attributes(ino)

    async def setattr(self, ino, attr, fields, _fh, _ctx):
        if fields.update_size:
            self.content = self.content[: attr.st_size].ljust(attr.st_size, b"\0")
        return self.attributes(ino)

    async def open(self, ino, _flags, _ctx):
        await self.begin("open")
        return pyfuse3.FileInfo(fh=ino, keep_cache=False)

    async def read(self, _fh, offset, size):
        await self.begin("read")
        return bytes(self.content[offset : offset + size])

    async def write(self, _fh, offset, data):
        await self.begin("write")
        end = offset + len(data)
        self.content = self.content.ljust(end, b"\0")
        self.content[offset:end] = data
        return len(data)

    async def fsync(self, _fh, _datasync):
        await self.begin("fsync")

    async def flush(self, fh):
        pass

    async def release(self, fh):
        pass

    def obey(self, words: list[str]) -> object:
        if words[0] == "hang":
            self.hanging.add(words[1])
            self.go = trio.Event()
        elif words[0] == "go":
            self.hanging.clear()
            self.go.set()
        elif words[0] == "fail":
            self.failing[words[1]] = int(words[2])
        elif words[0] == "well":
            self.failing.clear()
        elif words[0] == "fill":
            self.content = bytearray(words[2].encode() * int(words[1]))
        return "ok"


async def obey(slow: Slow) -> None:
    say("ready")
    async with trio.lowlevel.FdStream(os.dup(0)) as commands:
        rest = b""
        async for data in commands:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                say(slow.obey(line.decode().split()))


async def main(place: str) -> None:
    slow = Slow()
    pyfuse3.init(slow, place, {"fsname=slow", "subtype=slow"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, slow)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
