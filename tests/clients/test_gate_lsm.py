"""The lsm gate: nobody maps a region, or changes a mapping's protection, without leave.

Most of this needs a kernel that runs BPF LSM programs; scripts/vm-test boots one. There a gate that
cannot be had is a failure; elsewhere a skip, which names what is missing.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from msharefs.abi import Gate, Prot
from msharefs.client import Region, connect
from msharefs.clients import gate_lsm
from msharefs.clients.gate import GateUnavailable, Mmap
from msharefs.clients.gate_lsm import LsmGate
from msharefs.memory import tmpfs
from msharefs.service.gates import open_gate, open_lsm_gate
from msharefs.service.mounts import unmount
from msharefs.service.probe import probe_all
from tests.conftest import serving
from tests.objects.conftest import held, on_loop, overlay

PATIENCE = 60
PAGE = 4096
SIZE = 16 * PAGE
NOBODY = 65534
READ_IMPLIES_EXEC = 0x0400000
SYS_PKEY_MPROTECT = 329
RW = int(Prot.READ | Prot.WRITE)
MAP_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_it(fd, prot=RW, flags=mmap.MAP_SHARED, size=SIZE):
    """mmap(2) as it is: the address, or the negative errno."""
    address = libc.mmap(None, size, prot, flags, fd, 0)
    return -ctypes.get_errno() if address == MAP_FAILED else address


def try_map(fd, prot=RW, flags=mmap.MAP_SHARED, size=SIZE):
    """The errno of mmap(2), or 0, with nothing left mapped."""
    address = map_it(fd, prot, flags, size)
    if address < 0:
        return -address
    assert libc.munmap(address, size) == 0
    return 0


def protect(address, prot, size=PAGE):
    """The errno of mprotect(2), or 0."""
    return ctypes.get_errno() if libc.mprotect(address, size, prot) else 0


def start(work):
    """A child process that does ``work`` and ends with the number that this returns."""
    child = os.fork()
    if child:
        return child
    code = 255
    try:
        code = work()
    finally:
        os._exit(code)


def end_of(child):
    """How the child ended: its exit status, or minus the signal. Ends it if it does not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"process {child} did not end")


def in_child(work):
    return end_of(start(work))


def wait_until(reached):
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waits_in_mmap(pid):
    return Path(f"/proc/{pid}/syscall").read_text().startswith("9 ")


@pytest.fixture(scope="module")
def lsm():
    try:
        open_lsm_gate(lenient=True).close()
    except GateUnavailable as error:
        if os.environ.get("MSHAREFS_TEST_GATE") == "lsm":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def gated(lsm, tmp_path_factory):
    """One mount for all tests that leave it as it was: to start one takes seconds in there."""
    with serving(tmp_path_factory.mktemp("gated")) as start:
        yield start("gate=lsm")


@contextlib.contextmanager
def half_mapped(mount):
    """A region of 16 pages, the first half mapped read-write."""
    path = mount.path / "r"
    with Region.create(path, SIZE) as made:
        made.map(0, SIZE // 2, "rw-")
        yield made
    path.unlink()


@pytest.fixture
def region(gated):
    with half_mapped(gated) as made:
        yield made


# -- the verdict ----------------------------------------------------------------------------------


def test_the_mount_says_which_gate_it_has(gated, region):
    assert region.info().gate is Gate.LSM
    assert connect(gated.path).info().gate is Gate.LSM


def test_check_tries_it_out(lsm):
    (found,) = (found for found in probe_all() if found.name == "lsm-gate")
    assert (found.ok, found.required) == (True, False)


def test_private_is_refused_whatever_it_asks_for(gated, region):
    for prot in range(8):
        assert try_map(region.fd, prot, mmap.MAP_PRIVATE) == errno.EINVAL
    assert try_map(region.fd) == 0
    assert try_map(region.fd, flags=3) == 0  # MAP_SHARED_VALIDATE


def test_private_is_let_in_where_the_mount_allows_it(lsm, start_mount):
    mount = start_mount("gate=lsm,private=allow")
    with Region.create(mount.path / "r", SIZE) as region:
        region.map(0, SIZE, "rw-")
        assert try_map(region.fd, Prot.READ, mmap.MAP_PRIVATE) == 0
        assert try_map(region.fd, Prot.READ) == errno.EACCES


def test_a_mapping_must_cover_what_is_inside(gated):
    """Every protection inside against every one asked for."""
    wrong = []
    for inside in range(8):
        path = gated.path / f"inside{inside}"
        with Region.create(path, SIZE) as region:
            region.map(PAGE, PAGE, Prot(inside))
            for asked in range(8):
                expected = errno.EACCES if inside & ~asked else 0
                got = try_map(region.fd, asked)
                if got != expected:
                    wrong.append((Prot(inside).text(), Prot(asked).text(), got))
        path.unlink()
    assert not wrong


def test_the_verdict_follows_the_table(gated, region):
    region.unmap(0, SIZE)
    assert try_map(region.fd, Prot.NONE) == 0  # nothing is inside
    region.map(0, PAGE, "r--")
    assert try_map(region.fd, Prot.NONE) == errno.EACCES
    assert try_map(region.fd, Prot.READ) == 0
    region.protect(0, PAGE, "rw-")
    assert try_map(region.fd, Prot.READ) == errno.EACCES
    region.unmap(0, PAGE)
    assert try_map(region.fd, Prot.READ) == 0


def test_what_counts_is_what_the_mapping_will_be(gated, region):
    """READ_IMPLIES_EXEC, personality(2): who asks for r gets r and x."""
    region.unmap(0, SIZE)
    region.map(0, PAGE, "r-x")
    assert try_map(region.fd, Prot.READ) == errno.EACCES

    def work():
        assert libc.personality(READ_IMPLIES_EXEC) >= 0
        return try_map(region.fd, Prot.READ)

    assert in_child(work) == 0


def test_a_refusal_is_told_with_its_reason(gated, region):
    with connect(gated.path).region("r").events(timeout=PATIENCE, history=True) as events:
        try_map(region.fd, flags=mmap.MAP_PRIVATE)
        try_map(region.fd, Prot.READ)
        found = []
        for event in events:
            if event["event"] == "refuse":
                found.append((event["via"], event["error"], event["pid"]))
                assert event["reason"]
            if len(found) == 2:
                break
    us = os.getpid()
    assert found == [("mmap", "EINVAL", us), ("mmap", "EACCES", us)]


# -- who is seen ----------------------------------------------------------------------------------


def test_an_inherited_descriptor_is_seen(gated, region):
    assert in_child(lambda: try_map(region.fd, Prot.READ)) == errno.EACCES
    assert in_child(lambda: try_map(region.fd, flags=mmap.MAP_PRIVATE)) == errno.EINVAL
    assert in_child(lambda: try_map(region.fd)) == 0


def test_a_descriptor_passed_by_a_socket_is_seen(gated, region):
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def work():
            region.close()
            _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4))
            (fd,) = array.array("i", ancillary[0][2])
            return try_map(fd, Prot.READ)

        child = start(work)
        rights = array.array("i", [region.fd])
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert end_of(child) == errno.EACCES


def test_another_thread_and_a_later_mmap_are_seen(gated, region):
    assert try_map(region.fd) == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(try_map(region.fd, Prot.READ)))
    thread.start()
    thread.join(PATIENCE)
    assert found == [errno.EACCES]


def test_who_may_not_read_the_file_but_was_given_it_is_let_in(gated, region):
    """The kernel does not let such a caller ask. It is for the census to find."""

    def work(prot, flags):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return try_map(region.fd, prot, flags)

    assert (gated.path / "r").stat().st_mode & 0o077 == 0
    assert in_child(lambda: work(RW, mmap.MAP_SHARED)) == 0
    assert in_child(lambda: work(RW, mmap.MAP_PRIVATE)) == errno.EINVAL


def test_the_program_can_be_told_to_refuse_those(lsm, start_mount):
    """Without a daemon: whoever cannot be asked about is refused, and it fails closed as well."""
    mount = start_mount("gate=none")
    with Region.create(mount.path / "r", SIZE) as region, strict_gate() as gate:
        gate.add_mount(os.fstat(region.fd).st_dev, 0)

        def work():
            os.setuid(NOBODY)
            return try_map(region.fd)

        assert in_child(work) == errno.EACCES
        # This daemon does not know the question (EOPNOTSUPP): no leave, no mapping.
        assert try_map(region.fd) == errno.EACCES
        gate.remove_mount()
        assert in_child(work) == 0


def test_what_is_not_ours_is_left_alone(gated, region, tmp_path):
    assert try_map(-1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) == 0
    assert try_map(-1, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) == 0
    for fd in (os.memfd_create("m"), os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)):
        os.truncate(fd, SIZE)
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            address = map_it(fd, flags=flags)
            assert address > 0
            assert protect(address, Prot.READ) == 0
            assert libc.munmap(address, SIZE) == 0
        os.close(fd)


def test_the_mounts_other_files_may_be_mapped_privately(gated):
    """They are no regions: what is asked about them is answered yes."""
    fd = os.open(gated.path / "mshare_info", os.O_RDONLY)
    try:
        assert try_map(fd, Prot.READ, mmap.MAP_PRIVATE, PAGE) == 0
    finally:
        os.close(fd)


def test_no_program_can_put_the_question_itself(gated, region):
    for _ in range(2):  # the first answer must not end the asking, as ENOSYS would
        for name in ("user.other", "user.msharefs.0000000000000000.rw-s", "security.selinux"):
            with pytest.raises(OSError) as caught:
                os.getxattr(region.fd, name)
            assert caught.value.errno == errno.ENODATA
    assert try_map(region.fd, Prot.READ) == errno.EACCES


def test_each_mount_has_its_own_gate(gated, region, start_mount):
    other, ungated = start_mount("gate=lsm"), start_mount("gate=none")
    with (
        Region.create(other.path / "r", SIZE) as second,
        Region.create(ungated.path / "r", SIZE) as third,
    ):
        assert try_map(second.fd, Prot.READ) == 0  # holds nothing
        assert try_map(region.fd, Prot.READ) == errno.EACCES
        assert try_map(third.fd, flags=mmap.MAP_PRIVATE) == 0
        assert third.info().gate is Gate.NONE
        other.stop()
        assert try_map(region.fd, Prot.READ) == errno.EACCES


# -- mprotect -------------------------------------------------------------------------------------


def test_a_clients_own_mprotect_is_refused(gated, region):
    address = map_it(region.fd)
    assert address > 0
    try:
        for prot in (Prot.NONE, Prot.READ, RW, 7):
            assert protect(address, prot, SIZE) == errno.EACCES
            assert protect(address + PAGE, prot) == errno.EACCES
        result = libc.syscall(SYS_PKEY_MPROTECT, ctypes.c_void_p(address), PAGE, Prot.READ, -1)
        assert (result, ctypes.get_errno()) == (-1, errno.EACCES)
        ctypes.memset(address, 1, PAGE)  # and so it is as writable as it was
        assert in_child(lambda: protect(address, Prot.READ)) == errno.EACCES
    finally:
        assert libc.munmap(address, SIZE) == 0


@pytest.mark.parametrize("kind", ["memfd", "ext4", "overlay"])
def test_nor_may_it_change_that_of_a_file_in_the_region(gated, region, tmp_path, kind):
    """Its mapping is one of that file, wherever it lies, and the file elsewhere is not watched."""
    with contextlib.ExitStack() as stack:
        if kind == "memfd":
            fd = os.memfd_create("object")
        else:
            made = overlay(tmp_path) if kind == "overlay" else on_loop(tmp_path, kind, 16 << 20)
            disk = stack.enter_context(made)
            fd = os.open(disk / "object", os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, fd)
        os.write(fd, b"x" * SIZE)
        region.map(0, 4 * PAGE, "rw-", fd=fd)
        stack.callback(gated.until, lambda: not held(gated, fd), "the file to be let go of")
        stack.callback(region.unmap, 0, SIZE)
        address, elsewhere = map_it(region.fd), map_it(fd)
        assert min(address, elsewhere) > 0
        stack.callback(libc.munmap, address, SIZE)
        stack.callback(libc.munmap, elsewhere, SIZE)
        assert ctypes.string_at(address, 1) == b"x"
        for prot in (Prot.NONE, Prot.READ, RW, 7):
            assert protect(address, prot) == errno.EACCES
            assert protect(address, prot, SIZE) == errno.EACCES
            assert protect(elsewhere, prot, SIZE) == 0
        region.protect(PAGE, PAGE, "r--")  # the server goes on to be let
        ctypes.memset(address, ord("y"), PAGE)
        assert os.pread(fd, 1, 0) == b"y"
        assert protect(address + PAGE, RW) == errno.EACCES


@contextlib.contextmanager
def strict_gate():
    """A gate without a mount and without a daemon that answers it."""
    gate = open_lsm_gate(lenient=False)
    try:
        yield gate
    finally:
        gate.close()


@contextlib.contextmanager
def watched_memory(gate):
    """The address of a mapping whose device the gate watches."""
    directory = tmpfs.open_detached({})
    fd = tmpfs.unnamed_file(directory)
    os.truncate(fd, SIZE)
    address = map_it(fd)
    assert address > 0
    gate.add_mount(0, os.fstat(fd).st_dev)
    try:
        yield address
    finally:
        libc.munmap(address, SIZE)
        os.close(fd)
        os.close(directory)


def test_a_borrowed_thread_may_and_no_other(lsm):
    with strict_gate() as gate, watched_memory(gate) as address:
        assert protect(address, Prot.READ) == errno.EACCES
        gate.allow(threading.get_native_id())
        gate.allow(threading.get_native_id())  # once is enough, twice does no harm
        assert protect(address, Prot.READ) == 0
        found = []
        thread = threading.Thread(target=lambda: found.append(protect(address, Prot.READ)))
        thread.start()
        thread.join(PATIENCE)
        assert found == [errno.EACCES]
        assert in_child(lambda: protect(address, Prot.READ)) == errno.EACCES
        gate.disallow(threading.get_native_id())
        gate.disallow(threading.get_native_id())
        assert protect(address, Prot.READ) == errno.EACCES
        gate.remove_mount()
        assert protect(address, Prot.READ) == 0


def test_a_closed_gate_is_open_to_all_and_leaves_nothing(lsm):
    before = len(os.listdir("/proc/self/fd"))
    with strict_gate() as gate, watched_memory(gate) as address:
        assert protect(address, Prot.READ) == errno.EACCES
        gate.close()
        assert protect(address, Prot.READ) == 0
        gate.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- who dies -------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(mount):
    """The daemon answers nothing meanwhile."""
    mount.process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{mount.process.pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    try:
        yield
    finally:
        mount.process.send_signal(signal.SIGCONT)


def test_a_client_killed_while_it_waits_harms_nobody(gated, region):
    with stopped(gated):
        child = start(lambda: try_map(region.fd))
        wait_until(lambda: waits_in_mmap(child))
        os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    assert try_map(region.fd) == 0
    assert try_map(region.fd, Prot.READ) == errno.EACCES


def test_a_signal_while_it_waits_is_no_error(gated, region):
    """mmap(2) has no EINTR: the handler runs when the mapping is there."""

    def work():
        seen = []
        signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
        result = try_map(region.fd)
        return result or (0 if seen else 1)

    with stopped(gated):
        child = start(work)
        wait_until(lambda: waits_in_mmap(child))
        os.kill(child, signal.SIGUSR1)
    assert end_of(child) == 0


def test_a_daemon_killed_while_a_client_waits_refuses_it(lsm, start_mount):
    """No answer is no leave. The gate goes with the daemon, and nobody hangs."""
    mount = start_mount("gate=lsm")
    mount.expect_exit = -signal.SIGKILL
    region = Region.create(mount.path / "r", SIZE)
    region.map(0, SIZE // 2, "rw-")
    address = map_it(region.fd)
    with stopped(mount):
        child = start(lambda: try_map(region.fd))
        wait_until(lambda: waits_in_mmap(child))
        mount.process.kill()
        mount.process.wait(PATIENCE)
    assert end_of(child) == errno.EACCES
    # The mapping goes on, and protects itself again: there is no gate any more.
    ctypes.memset(address, 7, SIZE // 2)
    wait_until(lambda: protect(address, Prot.READ) == 0)
    assert libc.munmap(address, SIZE) == 0
    region.close()
    unmount(mount.path, detach=True)


# -- where it cannot be had -----------------------------------------------------------------------


@pytest.fixture
def canary():
    directory = tmpfs.open_detached({})
    fd = tmpfs.unnamed_file(directory)
    yield fd
    os.close(fd)
    os.close(directory)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a detached tmpfs needs root")


@needs_root
def test_what_is_missing_is_named(canary, tmp_path, monkeypatch):
    with pytest.raises(GateUnavailable, match="scripts/setup --lsm"):
        LsmGate.open(canary, path=tmp_path / "none")
    broken = tmp_path / "broken"
    broken.write_bytes(b"not a program")
    monkeypatch.setattr(gate_lsm, "_LIBRARY", "libbpf.so.none")
    with pytest.raises(GateUnavailable, match=r"libbpf\.so\.none is not there"):
        LsmGate.open(canary, path=broken)
    monkeypatch.setattr(gate_lsm, "_LIBRARY", "libc.so.6")
    with pytest.raises(GateUnavailable, match=r"libc\.so\.6 is too old"):
        LsmGate.open(canary, path=broken)


@needs_root
def test_no_program_is_no_gate(canary, tmp_path):
    try:
        ctypes.CDLL(gate_lsm._LIBRARY)
    except OSError:
        pytest.skip("libbpf.so.1 is missing")
    broken = tmp_path / "broken"
    broken.write_bytes(b"not a program")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(GateUnavailable, match="cannot read the program"):
            LsmGate.open(canary, path=broken)
    assert len(os.listdir("/proc/self/fd")) == before


@needs_root
def test_auto_does_without(monkeypatch, tmp_path):
    monkeypatch.setattr(gate_lsm, "OBJECT", tmp_path / "none")
    assert open_gate("auto").kind in {Gate.PTRACE, Gate.NONE}
    assert open_gate("none").kind is Gate.NONE
    with pytest.raises(GateUnavailable, match="scripts/setup --lsm"):
        open_gate("lsm")


def test_the_questions():
    asked = dict(gate_lsm._questions())
    assert asked[b"rw-s"] == Mmap(Prot.READ | Prot.WRITE, private=False)
    assert asked[b"---s"] == Mmap(Prot.NONE, private=False)
    assert asked[b"p"].private
    assert len(asked) == 9
    source = (Path(gate_lsm.OBJECT).parent / "mmap_gate.bpf.c").read_bytes()
    for name in asked:
        assert source.count(b'"' + name + b'"') == 1
