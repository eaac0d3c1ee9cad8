"""Plain files on an automap mount against plain files on tmpfs: the same calls, the same outcomes.

Each scenario is run on a real tmpfs and on the mount, and must return the same: values, contents,
and the errno of what fails. Where the mount differs on purpose, the difference is asserted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import mmap
import os
import signal
import socket
import stat
import subprocess

import pytest

PAGE = 4096
MIB = 1 << 20
LIMIT = 16 * MIB
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT = 1, 2, 8, 16, 32

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@pytest.fixture(params=["checked", "native"])
def both(start_mount, tmp_path, request):
    """(a directory on tmpfs, one on the mount), with the same limit."""
    mount = start_mount(f"automap,size={LIMIT},io={request.param}")
    tmpfs = tmp_path / "tmpfs"
    tmpfs.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={LIMIT},mode=1777", "none", str(tmpfs)], check=True
    )
    try:
        yield tmpfs, mount.path
    finally:
        subprocess.run(["umount", str(tmpfs)], check=True)


def attempt(call, *arguments, **named):
    """What the call returns, or the name of its errno."""
    try:
        return call(*arguments, **named)
    except OSError as error:
        return errno.errorcode[error.errno]


def fallocate(fd, mode, offset, length):
    if libc.fallocate(fd, mode, offset, length):
        return errno.errorcode[ctypes.get_errno()]
    return 0


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR | os.O_CREAT, mode=0o644):
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def state(fd):
    """Size, memory in use and contents, the latter short."""
    found = os.fstat(fd)
    content = os.pread(fd, min(found.st_size, 4 * MIB), 0)
    runs = [(b, content.count(b)) for b in sorted(set(content))]
    return found.st_size, found.st_blocks, runs


# -- scenarios: each takes a directory and returns what it saw


def grow_by_write(at):
    with opened(at / "f") as fd:
        seen = [os.write(fd, b"a" * 100), os.write(fd, b"b" * PAGE), state(fd)]
        seen += [os.pwrite(fd, b"c", 5 * PAGE + 7), state(fd)]
        seen += [os.pwritev(fd, [b"d" * 10, b"e" * 10], 90), os.pread(fd, 200, 0)]
        seen += [os.preadv(fd, [bytearray(3), bytearray(8192)], 0), os.pread(fd, 10, 99 * PAGE)]
        seen += [os.lseek(fd, 0, os.SEEK_CUR), os.lseek(fd, -1, os.SEEK_END)]
    return seen


def grow_and_shrink(at):
    seen = []
    with opened(at / "f") as fd:
        for size in (1, PAGE, 3 * PAGE + 5, 7, 0, 10 * PAGE, 10 * PAGE - 1, 2 * PAGE + 3):
            os.ftruncate(fd, size)
            seen.append(state(fd))
            if size > 8:
                os.pwrite(fd, b"x" * 8, size - 8)
            seen.append(state(fd))
        # what lay past the end within the last page is zero when the file grows again
        os.pwrite(fd, b"y" * 2 * PAGE, 0)
        os.ftruncate(fd, 100)
        os.ftruncate(fd, PAGE)
        seen += [state(fd), attempt(os.ftruncate, fd, -1)]
    seen += [attempt(os.truncate, at / "f", 5), os.stat(at / "f").st_size]
    return seen


def append(at):
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(at / "f", flags) as one, opened(at / "f", flags) as other:
        for _ in range(50):
            os.write(one, b"1" * 33)
            os.pwrite(other, b"2" * 44, 0)  # with O_APPEND the offset does not count: pwrite(2)
    with opened(at / "f", os.O_RDWR | os.O_TRUNC) as fd:
        return os.fstat(fd).st_size


def appended_content(at):
    with opened(at / "f", os.O_RDWR | os.O_APPEND | os.O_CREAT) as fd:
        for size in (1, PAGE - 1, 2, 3 * PAGE):
            os.write(fd, b"z" * size)
            os.lseek(fd, 0, os.SEEK_SET)
        return state(fd)


def exclusive_and_truncating_opens(at):
    seen = []
    with opened(at / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
        os.write(fd, b"content")
        seen.append(attempt(os.open, at / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR))
        with opened(at / "f", os.O_RDONLY) as reader:
            seen += [os.read(reader, 100), attempt(os.write, reader, b"x")]
        with opened(at / "f", os.O_WRONLY) as writer:
            seen += [attempt(os.read, writer, 1), os.write(writer, b"C")]
        with opened(at / "f", os.O_RDWR | os.O_TRUNC) as again:
            seen += [os.fstat(again).st_size, os.fstat(fd).st_size, os.pread(fd, 9, 0)]
    seen.append(attempt(os.open, at / "none", os.O_RDONLY))
    seen.append(attempt(os.open, at / "f" / "g", os.O_RDONLY))
    return seen


def read_only_users_of_a_writable_file(at):
    with opened(at / "f") as fd:
        os.ftruncate(fd, 3 * PAGE)
        with opened(at / "f", os.O_RDONLY) as reader:
            view = mmap.mmap(reader, 3 * PAGE, prot=mmap.PROT_READ)
            denied = attempt(mmap.mmap, reader, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        os.pwrite(fd, b"seen", PAGE)
        part = mmap.mmap(fd, PAGE, offset=PAGE)
        both_see = bytes(view[PAGE : PAGE + 4]), bytes(part[:4])
        part[:5] = b"store"
        seen = denied, both_see, bytes(view[PAGE : PAGE + 5]), os.pread(fd, 5, PAGE)
        part.close()
        view.close()
    return seen


def map_first_and_grow_later(at):
    """As LMDB does: a mapping larger than the file, which then grows under it."""
    with opened(at / "f") as fd:
        os.ftruncate(fd, PAGE)
        address = libc.mmap
        address.restype = ctypes.c_void_p
        address.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        place = address(None, 64 * PAGE, 3, mmap.MAP_SHARED, fd, 0)
        memory = (ctypes.c_char * (64 * PAGE)).from_address(place)
        os.pwrite(fd, b"grown", 10 * PAGE)
        seen = [memory[10 * PAGE : 10 * PAGE + 5]]
        os.ftruncate(fd, 64 * PAGE)
        memory[63 * PAGE] = b"!"
        seen.append(os.pread(fd, 1, 63 * PAGE))
        os.ftruncate(fd, PAGE)
        pid = os.fork()
        if not pid:
            faulthandler.disable()
            ctypes.string_at(place + 2 * PAGE, 1)
            os._exit(0)
        seen.append(signal.Signals(os.waitpid(pid, 0)[1] & 0x7F).name)
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.munmap(place, 64 * PAGE)
    return seen


def allocate(at):
    seen = []
    with opened(at / "f") as fd:
        for mode, offset, length in [
            (0, 100, 2 * PAGE),
            (KEEP_SIZE, 8 * PAGE, PAGE),
            (PUNCH_HOLE, 0, PAGE),
            (PUNCH_HOLE | KEEP_SIZE, 0, PAGE),
            (PUNCH_HOLE | KEEP_SIZE, 90 * PAGE, PAGE),
            (COLLAPSE, 0, PAGE),
            (INSERT, 0, PAGE),
            (0x40, 0, PAGE),
            (0, 0, 0),
            (0, -1, PAGE),
            (0, 0, (1 << 63) - 1),
            (0, 0, LIMIT + PAGE),
        ]:
            seen += [(mode, offset, fallocate(fd, mode, offset, length)), state(fd)]
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"k" * 4 * PAGE, 0)
        seen += [fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 100, 2 * PAGE), state(fd)]
        seen += [attempt(os.posix_fallocate, fd, 0, 6 * PAGE), state(fd)]
    with opened(at / "f", os.O_RDONLY) as fd:
        seen.append(fallocate(fd, 0, 0, PAGE))
    return seen


def holes(at):
    with opened(at / "f") as fd:
        os.ftruncate(fd, 40 * PAGE)
        os.pwrite(fd, b"1", 10 * PAGE)
        os.pwrite(fd, b"2" * PAGE * 2, 20 * PAGE)
        seen = []
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            pages = (0, 10, 10.5, 11, 21, 22, 39.9, 40, 41, -1)
            seen += [attempt(os.lseek, fd, int(page * PAGE), whence) for page in pages]
        return [*seen, state(fd)]


def no_space(at):
    seen = []
    with opened(at / "f") as fd:
        seen += [attempt(os.ftruncate, fd, 10 * LIMIT), os.fstat(fd).st_size]
        seen += [attempt(os.pwrite, fd, b"far", 9 * LIMIT), os.pread(fd, 3, 9 * LIMIT)]
        seen += [fallocate(fd, 0, 0, LIMIT), fallocate(fd, 0, 0, LIMIT - MIB)]
        seen.append(os.fstat(fd).st_blocks)
    with opened(at / "g") as fd:
        chunk, written = b"w" * MIB, 0
        while (count := attempt(os.write, fd, chunk)) != "ENOSPC":
            written += count
        seen += [written, os.fstat(fd).st_size]
    found = os.statvfs(at)
    return [*seen, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize]


def names(at):
    seen = []
    for name, content in (("a", b"A"), ("b", b"BB")):
        with opened(at / name) as fd:
            os.write(fd, content)
    with opened(at / "b") as old:
        os.rename(at / "a", at / "b")
        seen += [os.pread(old, 9, 0), os.fstat(old).st_nlink, (at / "b").read_bytes()]
    os.link(at / "b", at / "c")
    os.unlink(at / "b")
    seen += [os.stat(at / "c").st_nlink, (at / "c").read_bytes(), attempt(os.stat, at / "b")]
    os.symlink("c", at / "s")
    os.symlink("nowhere", at / "dangling")
    os.mkdir(at / "d")
    os.symlink("../c", at / "d" / "up")
    seen += [os.readlink(at / "s"), (at / "s").read_bytes(), (at / "d" / "up").read_bytes()]
    seen += [os.lstat(at / "s").st_size, stat.filemode(os.lstat(at / "s").st_mode)]
    seen += [
        attempt(os.open, at / "s", os.O_RDONLY | os.O_NOFOLLOW),
        attempt(os.readlink, at / "c"),
    ]
    seen += [attempt(os.stat, at / "dangling"), attempt(os.symlink, "x", at / "s")]
    os.link(at / "s", at / "t", follow_symlinks=False)
    os.rename(at / "t", at / "d" / "t")
    seen += [os.lstat(at / "s").st_nlink, sorted(os.listdir(at / "d"))]
    os.unlink(at / "d" / "t")
    os.unlink(at / "d" / "up")
    seen += [attempt(os.rmdir, at / "d"), attempt(os.unlink, at / "d")]
    os.rename(at / "s", at / "c")  # a link over a file
    seen += [os.readlink(at / "c"), attempt(os.stat, at / "c")]
    return seen


def pipes_and_sockets(at):
    os.mkfifo(at / "p", 0o600)
    reader = os.open(at / "p", os.O_RDONLY | os.O_NONBLOCK)
    with opened(at / "p", os.O_WRONLY) as writer:
        os.write(writer, b"through")
        seen = [os.read(reader, 99), stat.filemode(os.lstat(at / "p").st_mode)]
    os.close(reader)
    server = socket.socket(socket.AF_UNIX)
    client = socket.socket(socket.AF_UNIX)
    with server, client:
        server.bind(os.path.relpath(at / "q"))
        server.listen()
        client.connect(os.path.relpath(at / "q"))
        seen.append(stat.S_ISSOCK(os.stat(at / "q").st_mode))
    os.unlink(at / "p")
    os.unlink(at / "q")
    return [*seen, os.listdir(at / "sub") if (at / "sub").exists() else []]


def unlinked_while_mapped(at):
    with opened(at / "f") as fd:
        os.ftruncate(fd, 2 * PAGE)
        memory = mmap.mmap(fd, 2 * PAGE)
    os.unlink(at / "f")
    with opened(at / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
        os.write(fd, b"another")
        memory[:3] = b"old"
        seen = bytes(memory[:3]), os.pread(fd, 9, 0)
    memory.close()
    os.unlink(at / "f")
    return seen


def copies(at):
    with opened(at / "a") as one, opened(at / "b") as two:
        os.write(one, bytes(range(256)) * 600)
        memory = mmap.mmap(one, 0)
        memory[:6] = b"stored"
        seen = [os.copy_file_range(one, two, 100_000, 0, 50), state(two)[:1], os.pread(two, 6, 50)]
        seen += [os.copy_file_range(one, two, MIB, 1000, 0), os.fstat(two).st_size]
        seen += [os.copy_file_range(one, two, 10, 10 * MIB, 0)]
        seen += [attempt(os.copy_file_range, one, one, 1000, 0, 10)]
        memory.close()
        receiver, sender = os.pipe()
        fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, MIB)
        seen += [os.sendfile(sender, one, 0, 5000), os.read(receiver, 6000)[:8]]
        seen += [os.splice(one, sender, 3000, offset_src=10), len(os.read(receiver, 6000))]
        os.write(sender, b"from a pipe")
        seen += [os.splice(receiver, two, 11, offset_dst=4), os.pread(two, 11, 4)]
        os.close(receiver)
        os.close(sender)
    return seen


def syncs(at):
    with opened(at / "f") as fd:
        os.write(fd, b"x" * PAGE)
        memory = mmap.mmap(fd, 0)
        memory[0] = 1
        memory.flush()
        memory.close()
        directory = os.open(at, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)
        advice = attempt(os.posix_fadvise, fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return attempt(os.fsync, fd), attempt(os.fdatasync, fd), advice


def times_and_modes(at):
    with opened(at / "f", mode=0o640) as fd:
        os.utime(fd, ns=(10**9, 2 * 10**9))
        seen = [os.fstat(fd).st_mtime_ns, stat.filemode(os.fstat(fd).st_mode)]
        before = os.fstat(fd).st_mtime_ns
        os.ftruncate(fd, 10)
        seen.append(os.fstat(fd).st_mtime_ns > before)
        os.utime(fd, ns=(10**9, 2 * 10**9))
        fallocate(fd, 0, 0, 2 * PAGE)
        seen.append(os.fstat(fd).st_mtime_ns > before)
        os.fchmod(fd, 0o4755)
        os.fchown(fd, 12, 34)
        found = os.fstat(fd)
        return [*seen, stat.filemode(found.st_mode), found.st_uid, found.st_gid]


SCENARIOS = [
    grow_by_write,
    grow_and_shrink,
    append,
    appended_content,
    exclusive_and_truncating_opens,
    read_only_users_of_a_writable_file,
    map_first_and_grow_later,
    allocate,
    holes,
    no_space,
    names,
    pipes_and_sockets,
    unlinked_while_mapped,
    copies,
    syncs,
    times_and_modes,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_same_as_on_tmpfs(both, scenario):
    tmpfs, mount = both
    assert scenario(mount) == scenario(tmpfs)
