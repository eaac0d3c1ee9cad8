"""What the calls on a region are compared with: the smallest filesystem pyfuse3 can serve.

usage: plainfs.py DIRECTORY

One file, ``file``, and nothing between the kernel and pyfuse3. Names are remembered by the kernel
and attributes are not, as on a mount of msharefs, so that a stat() of either is one request.
"""
# ruff: noqa: ARG002 (pyfuse3 names the arguments)

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

NAME = b"file"
FILE_INO = pyfuse3.ROOT_INODE + 1


class PlainFs(pyfuse3.Operations):
    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o600 if inode == FILE_INO else stat.S_IFDIR | 0o755
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = 3600
        entry.attr_timeout = 0 if inode == FILE_INO else 3600
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if parent_inode != pyfuse3.ROOT_INODE or name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INO)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def release(self, fh: int) -> None:
        """Nothing was kept."""


def main() -> None:
    options = set(pyfuse3.default_options) | {"fsname=plainfs", "default_permissions"}
    pyfuse3.init(PlainFs(), sys.argv[1], options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
