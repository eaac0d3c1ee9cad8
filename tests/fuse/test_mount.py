"""Real mounts, real programs: mounting itself, and each promise of the router and the session."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest

from msharefs.fuse import MountError, MountOptions, find_mounts, mount, mount_at, unmount

SUM_NOW, SUM_LATER = 0xC0105401, 0xC0105402
SLEEP, RAISE_NOW, RAISE_LATER, TOO_MUCH = 0x5403, 0x5404, 0x5405, 0x80085406
FINISHES, GO_ON, INVALIDATE, NONSENSE, WAKE = 0x5408, 0x5409, 0x540A, 0x540B, 0x540C
TCGETS = 0x5401
CREATE = os.O_RDWR | os.O_CREAT

libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened(path, flags=os.O_RDWR):
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        try:
            os.close(fd)
        except OSError as exc:
            # The mount has ended meanwhile, and with it whoever took the flush. It is closed.
            if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO):
                raise


@contextmanager
def client(program: str):
    """A Python program with ``fcntl``, ``os`` and ``mmap`` at hand; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, mmap, os, signal, sys\n" + program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def fails_with(code, call, *args):
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value


def seen(stats, *ops):
    return {op: stats["ops"].get(op, 0) for op in ops}


# -- mounting -----------------------------------------------------------------------------------


def refused(path, code, *words):
    with pytest.raises(MountError) as caught:
        mount(path, source="test")
    message = str(caught.value)
    assert caught.value.errno == code
    assert "\n" not in message
    for word in words:
        assert word in message
    assert isinstance(caught.value, OSError)


def test_a_missing_mount_point_is_refused(tmp_path):
    refused(tmp_path / "none", errno.ENOENT, "none", "mkdir")


def test_a_file_is_no_mount_point(tmp_path):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", errno.ENOTDIR, "not a directory")


def test_a_busy_mount_point_is_refused(toy, tmp_path):
    refused(toy.path, errno.EBUSY, "busy", "toy", "umount")
    (tmp_path / "link").symlink_to(toy.path)
    refused(tmp_path / "link", errno.EBUSY, "busy")
    assert toy.stats()["ops"]["INIT"] == 1
    # The server asked to mount there says so in one line, and leaves nothing.
    second = subprocess.run(
        [*toy.process.args[:2], str(toy.path)], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2
    assert "busy" in second.stderr
    assert len(second.stderr.splitlines()) == 1


def test_mount_needs_privilege():
    """As a user: one line that says what is needed. In a child, which gives up being root."""
    program = """
import tempfile
from msharefs.fuse import mount, MountError
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with tempfile.TemporaryDirectory(dir="/tmp") as path:
    try:
        mount(path, source="test")
    except MountError as exc:
        print(exc.errno, str(exc).replace(path, "DIR"))
"""
    if os.geteuid() != 0:
        pytest.skip("giving up privileges needs root")
    with client(program) as process:
        out, _ = process.communicate(timeout=30)
    code, _, message = out.partition(" ")
    assert int(code) in (errno.EPERM, errno.EACCES)
    assert "run as root" in message
    assert len(message.splitlines()) == 1


def test_what_is_mounted_can_be_found(toy, tmp_path):
    found = mount_at(toy.path)
    assert found in find_mounts()
    assert found.source == "toy"
    assert found.fstype == "fuse.msharefs"
    assert {"nosuid", "nodev", "allow_other", "default_permissions"} <= found.options
    number = toy.path.stat().st_dev
    assert found.device == (os.major(number), os.minor(number))
    assert mount_at(tmp_path) is None


@pytest.mark.usefixtures("toy")  # skips where nothing can be mounted
def test_options_and_names_with_blanks(tmp_path):
    """A device that nobody serves: mounted, found by its escaped name, unmounted."""
    path = tmp_path / "a b\\c\td"
    path.mkdir()
    options = MountOptions(read_only=True, noexec=True, noatime=True, allow_other=False)
    device = mount(path, source="with blank", options=options)
    try:
        assert not os.get_inheritable(device)
        assert not os.get_blocking(device)
        found = mount_at(path)
        assert found.source == "with blank"
        assert {"ro", "noexec", "noatime", "nosuid"} <= found.options
        assert "allow_other" not in found.options
    finally:
        os.close(device)
        unmount(path)
    assert mount_at(path) is None
    with pytest.raises(MountError, match="not a mount point"):
        unmount(path)


# -- passthrough --------------------------------------------------------------------------------


def test_mapped_memory_never_meets_the_server(passthrough):
    size = 16 << 20
    with opened(passthrough.path / "region", CREATE) as fd:
        os.ftruncate(fd, size)
        before = seen(passthrough.stats(), "READ", "WRITE")
        with mmap.mmap(fd, size) as memory:
            for offset in range(0, size, 4096):
                memory[offset] = 1
            memory[4096:4101] = b"hello"
            program = f"""
fd = os.open({str(passthrough.path / "region")!r}, os.O_RDWR)
memory = mmap.mmap(fd, {size})
print(bytes(memory[4096:4101])); memory[8192:8195] = b"you"
"""
            with client(program) as process:
                assert process.communicate(timeout=30)[0] == "b'hello'\n"
            assert memory[8192:8195] == b"you"
            memory.flush()
            stats = passthrough.stats()
            assert seen(stats, "READ", "WRITE") == before
            assert stats["backing"] == 1
            # read and write do come to the server, and see and change the same bytes.
            assert os.pread(fd, 3, 8192) == b"you"
            os.pwrite(fd, b"too", 8192)
            assert memory[8192:8195] == b"too"
    after = passthrough.wait_until(lambda stats: stats["backing"] == 0)
    assert seen(after, "READ", "WRITE") == {"READ": before["READ"] + 1, "WRITE": 1}


def test_a_backing_id_lives_while_the_file_is_open_anywhere(passthrough):
    path = passthrough.path / "region"
    with opened(path, CREATE) as first:
        with opened(path), opened(path, os.O_RDONLY), opened(path, os.O_WRONLY):
            assert passthrough.stats()["backing"] == 1
        os.ftruncate(first, 4096)
        with mmap.mmap(first, 4096) as memory:
            memory[:2] = b"ab"
    passthrough.wait_until(lambda stats: stats["backing"] == 0)
    with opened(path) as again, mmap.mmap(again, 4096) as memory:
        assert memory[:2] == b"ab"
        assert passthrough.stats()["backing"] == 1


def test_an_open_answered_later_is_passthrough_too(passthrough):
    with opened(passthrough.path / "handmade", CREATE) as fd:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096) as memory:
            memory[0] = 1
        assert passthrough.stats()["backing"] == 1


@pytest.mark.parametrize(("name", "code"), [("refused", errno.EXFULL), ("unbacked", errno.EBADF)])
def test_a_refused_open_leaves_no_open_file(passthrough, name, code):
    path = passthrough.path / name
    fails_with(code, os.open, path, CREATE)  # CREATE
    for flags in (os.O_RDWR, os.O_RDONLY):  # OPEN
        fails_with(code, os.open, path, flags)
    stats = passthrough.wait_until(lambda now: now["open_files"] == 0)
    assert stats["calls"]["open"] == stats["calls"]["release"] == 3
    assert stats["calls"]["forget"] >= 1
    assert stats["backing"] == 0
    assert "RELEASE" not in stats["ops"]  # the kernel sent none


# -- ioctl and fallocate ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [SUM_NOW, SUM_LATER])
def test_an_ioctl_is_answered(toy, command):
    argument = bytearray(struct.pack("<QQ", 5, 3))
    with opened(toy.path / "plain", CREATE) as fd:
        assert fcntl.ioctl(fd, command, argument) == 3
    assert struct.unpack("<QQ", argument) == (8, 2)


def test_an_ioctl_on_a_directory_is_answered(toy):
    argument = bytearray(struct.pack("<QQ", 5, 3))
    with opened(toy.path, os.O_RDONLY) as fd:
        assert fcntl.ioctl(fd, SUM_NOW, argument) == 3


def test_an_unknown_ioctl_is_enotty(toy):
    with opened(toy.path / "plain", CREATE) as fd:
        fails_with(errno.ENOTTY, fcntl.ioctl, fd, 0x54FF)
        assert not os.isatty(fd)


@pytest.mark.parametrize("command", [RAISE_NOW, RAISE_LATER, TOO_MUCH, NONSENSE])
def test_a_bug_in_a_handler_is_eio_for_one_caller(toy, command):
    with opened(toy.path / "plain", CREATE) as fd:
        fails_with(errno.EIO, fcntl.ioctl, fd, command, bytearray(8))
        assert fcntl.ioctl(fd, SUM_NOW, bytearray(16)) == 3
    log = toy.log.read_text()
    assert f"ioctl {command:#x}" in log
    assert f"pid {threading.get_native_id()}" in log
    assert "Traceback" in log


INTERRUPTED = """
signal.signal(signal.SIGUSR1, lambda *_: None)
class Stop(Exception): pass
def stop(*_): raise Stop
fd = os.open({path!r}, os.O_RDWR | os.O_CREAT)
signal.signal(signal.SIGUSR1, stop)
print("ready", flush=True)
try:
    {call}
except Stop:
    print("interrupted")
"""


def wait_for_a_request(toy):
    toy.wait_until(lambda stats: stats["waiting"] == 1)


def wait_for_readers(toy, count):
    """Until all of them have asked for data, and nothing else is under way."""
    toy.wait_until(lambda stats: stats["ops"].get("READ", 0) == count and stats["waiting"] == count)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("plain", f"fcntl.ioctl(fd, {SLEEP})"),
        ("stream", "os.read(fd, 100)"),
        ("slow", "os.read(fd, 100)"),
    ],
)
def test_a_signal_ends_a_call_that_waits(toy, name, call):
    program = INTERRUPTED.format(path=str(toy.path / name), call=call)
    with client(program) as process:
        assert process.stdout.readline() == "ready\n"
        wait_for_a_request(toy)
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=30)[0] == "interrupted\n"
    toy.wait_until(lambda stats: stats["waiting"] == 0 and stats["open_files"] == 0)


def test_a_signal_does_not_end_what_is_shielded(toy):
    program = INTERRUPTED.format(path=str(toy.path / "plain"), call=f"fcntl.ioctl(fd, {FINISHES})")
    with client(program) as process, opened(toy.path, os.O_RDONLY) as fd:
        assert process.stdout.readline() == "ready\n"
        wait_for_a_request(toy)
        process.send_signal(signal.SIGUSR1)
        toy.wait_until(lambda stats: stats["ops"].get("INTERRUPT", 0) > 0)
        assert toy.stats()["waiting"] == 1
        fcntl.ioctl(fd, GO_ON)
        # The call has returned 7 before the signal is delivered.
        assert process.communicate(timeout=30)[0] == "interrupted\n"
    assert toy.stats()["finished"] == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("plain", f"fcntl.ioctl(fd, {SLEEP})"),
        ("stream", "os.read(fd, 9)"),
        ("slow", "os.read(fd, 9)"),
    ],
)
def test_a_client_killed_inside_a_call_is_gone_at_once(toy, name, call):
    program = INTERRUPTED.format(path=str(toy.path / name), call=call)
    with client(program) as process:
        assert process.stdout.readline() == "ready\n"
        wait_for_a_request(toy)
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
    toy.wait_until(lambda stats: stats["waiting"] == 0 and stats["open_files"] == 0)


def test_getxattr(toy):
    path = toy.path / "plain"
    path.touch()
    for _ in range(2):  # the first "no such attribute" must not end the asking
        assert os.getxattr(path, "user.now") == b"a value"
        assert os.getxattr(path, "user.later") == str(threading.get_native_id()).encode()
        for name, code in (("user.refused", errno.EXFULL), ("user.other", errno.ENODATA)):
            with pytest.raises(OSError) as caught:
                os.getxattr(path, name)
            assert caught.value.errno == code
    # With a buffer that is too small, and with none, which asks for the length.
    buffer = ctypes.create_string_buffer(7)
    for size, result in ((7, 7), (6, -errno.ERANGE), (0, 7)):
        got = libc.getxattr(bytes(path), b"user.now", buffer, ctypes.c_size_t(size))
        assert (got if got >= 0 else -ctypes.get_errno()) == result


def test_fallocate(toy):
    with opened(toy.path / "plain", CREATE) as fd:
        os.posix_fallocate(fd, 4096, 8192)
        assert os.fstat(fd).st_size == 12288
        assert libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)) == -1
        assert ctypes.get_errno() == errno.EOPNOTSUPP
    assert toy.stats()["calls"]["fallocate"] == 2


# -- reads that wait ----------------------------------------------------------------------------


READERS = """
import threading
def read():
    with open({path!r}, "rb", buffering=0) as file:
        try:
            file.read(100)
        except OSError as exc:
            errors.append(exc.errno)
errors = []
threads = [threading.Thread(target=read) for _ in range({count})]
for thread in threads: thread.start()
print("ready", flush=True)
for thread in threads: thread.join()
print(len(errors), set(errors))
"""


def test_a_stream_that_waits_can_be_asked_without_waiting(toy):
    with (
        opened(toy.path / "stream", CREATE),
        opened(toy.path / "stream", os.O_RDONLY | os.O_NONBLOCK) as fd,
    ):
        fails_with(errno.EAGAIN, os.read, fd, 10)


@pytest.mark.parametrize("name", ["stream", "slow"])
def test_readers_that_wait_stop_neither_others_nor_the_end(toy, name):
    """200 of them, in the handler or held by pyfuse3; then the server is told to stop."""
    with opened(toy.path / name, CREATE):
        pass
    with client(READERS.format(path=str(toy.path / name), count=200)) as process:
        assert process.stdout.readline() == "ready\n"
        wait_for_readers(toy, 200)
        with opened(toy.path / "plain", CREATE) as fd:
            os.pwrite(fd, b"still here", 0)
            assert fcntl.ioctl(fd, SUM_LATER, bytearray(16)) == 3
        with pytest.raises(MountError, match="in use"):
            unmount(toy.path)
        assert toy.stop()["ended"] == 0
        out, _ = process.communicate(timeout=30)
    count, _, errors = out.partition(" ")
    assert int(count) == 200
    assert errors.strip() in (f"{{{errno.ECONNABORTED}}}", f"{{{errno.ENOTCONN}}}")


def test_a_write_passes_a_read_that_waits_on_the_same_descriptor(toy):
    with opened(toy.path / "stream", CREATE):
        pass
    with opened(toy.path / "stream") as fd:

        def read():
            with suppress(OSError):  # until the server ends
                os.read(fd, 10)

        reader = threading.Thread(target=read)
        reader.start()
        wait_for_a_request(toy)
        assert os.write(fd, b"command") == 7
        assert toy.stop()["ended"] == 0
        reader.join()


# -- the end ------------------------------------------------------------------------------------


def test_an_unmount_from_outside_ends_the_server(toy):
    with opened(toy.path / "region", CREATE):
        pass
    unmount(toy.path)
    report = toy.wait()
    assert report["ended"] == 0


def test_a_signal_unmounts(toy):
    with opened(toy.path / "plain", CREATE) as fd:
        os.write(fd, b"x" * 100_000)
    assert toy.stop()["ended"] == 0
    assert not toy.mounted()
    assert not list(toy.path.iterdir())


def test_a_mount_in_use_is_detached_and_its_mappings_live_on(passthrough):
    with opened(passthrough.path / "region", CREATE) as fd:
        os.ftruncate(fd, 1 << 20)
        with mmap.mmap(fd, 1 << 20) as memory:
            memory[:4] = b"live"
            assert passthrough.stop()["ended"] == 0
            assert not passthrough.mounted()
            assert memory[:4] == b"live"
            memory[1 << 19] = 7  # a page never touched before
            assert memory[1 << 19] == 7
            fails_with(errno.ENOTCONN, os.pread, fd, 4, 0)


def test_a_mount_that_was_moved_or_bound_elsewhere_is_found(toy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    bind = 4096
    assert libc.mount(os.fsencode(toy.path), os.fsencode(other), None, ctypes.c_ulong(bind), 0) == 0
    assert toy.stop()["ended"] == 0
    assert mount_at(other) is None


def test_an_aborted_connection_ends_the_server_and_the_mount(toy, tmp_path):
    control = tmp_path / "connections"
    control.mkdir()
    if libc.mount(b"none", os.fsencode(control), b"fusectl", ctypes.c_ulong(0), None) != 0:
        pytest.skip("no fusectl file system to abort a connection with")
    try:
        (control / str(mount_at(toy.path).device[1]) / "abort").write_text("1")
        toy.wait()
    finally:
        unmount(control)
    assert not toy.mounted()


def test_an_operation_that_raises_ends_in_good_order(toy):
    """It must not, by pyfuse3's rules: the mount goes, its users get errors and do not hang."""
    with (
        opened(toy.path / "stream", CREATE),
        client(READERS.format(path=str(toy.path / "stream"), count=3)) as process,
    ):
        assert process.stdout.readline() == "ready\n"
        wait_for_readers(toy, 3)
        fails_with(errno.EIO, os.stat, toy.path / "crash")
        report = toy.wait()
        assert process.communicate(timeout=30)[0].startswith("3 ")
    assert report["ended"] == 1
    assert "asked to crash" in toy.log.read_text()


# -- pyfuse3's own part, behind the router ------------------------------------------------------


def test_notifications_of_what_nobody_knows_do_no_harm(toy):
    with opened(toy.path / "plain", CREATE) as fd:
        for _ in range(100):
            fcntl.ioctl(fd, INVALIDATE)
        toy.wait_until(lambda stats: stats["notifications"] == [[3, errno.ENOENT, 100]])


def test_big_reads_and_writes_are_whole(toy):
    data = os.urandom(9 << 20)
    with opened(toy.path / "plain", CREATE) as fd:
        assert os.pwrite(fd, data, 0) == len(data)
    with opened(toy.path / "plain") as fd:
        got = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))
    assert got == data


def test_many_clients_at_once(toy):
    """Eight processes, every answer checked, nothing left over."""
    program = f"""
import random, struct
random.seed(int(sys.stdin.readline()))
for turn in range(300):
    path = {str(toy.path)!r} + "/plain%d-%d" % (os.getpid(), turn % 5)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    data = random.randbytes(random.choice([1, 5000, 300_000]))
    assert os.pwrite(fd, data, 0) == len(data)
    a, b = random.randrange(1 << 30), random.randrange(1 << 29)
    argument = bytearray(struct.pack("<QQ", a + b, b))
    assert fcntl.ioctl(fd, random.choice([{SUM_NOW}, {SUM_LATER}]), argument) == 3
    assert struct.unpack("<QQ", argument) == (a + 2 * b, a)
    os.close(fd)
    with open(path, "rb") as file:
        assert file.read(len(data)) == data
    if turn % 7 == 0:
        assert os.path.basename(path) in os.listdir({str(toy.path)!r})
print("done")
"""
    processes = []
    for seed in range(8):
        context = client(program)
        processes.append((context, context.__enter__(), seed))
    try:
        for _, process, seed in processes:
            process.stdin.write(f"{seed}\n")
            process.stdin.flush()
        for _, process, _ in processes:
            assert process.stdout.readline() == "done\n"
    finally:
        for context, _, _ in processes:
            context.__exit__(None, None, None)
    stats = toy.wait_until(lambda now: now["open_files"] == 0)
    assert stats["waiting"] == 0


@pytest.mark.parametrize("edge", [0, select.EPOLLET])
def test_poll_is_woken_through_the_router(toy, edge):
    with opened(toy.path / "plain", CREATE) as fd, select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | edge)
        assert epoll.poll(0) == []
        waker = threading.Thread(target=fcntl.ioctl, args=(fd, WAKE))
        waker.start()
        assert epoll.poll(30) == [(fd, select.EPOLLIN)]
        waker.join()


def test_a_handler_may_write(toy):
    with opened(toy.path / "upper", CREATE) as fd:
        assert os.write(fd, b"abc") == 3
        assert os.pread(fd, 10, 0) == b"ABC"
        fails_with(errno.EFBIG, os.pwrite, fd, b"x", 1 << 40)
        assert os.pwrite(fd, b"later", 100) == 4  # a short write, answered by a task
    assert toy.stats()["calls"]["write"] == 0  # pyfuse3 saw none
