"""The verdict on an mmap(), and those that no gate sees: the next change reaches them all the same."""

from __future__ import annotations

import array
import contextlib
import errno
import mmap
import os
import shutil
import signal
import socket
import subprocess

import pytest

from msharefs.client import Region, connect
from tests.enforcement.clients import PAGE, tracers, until

READ, WRITE = 1, 2
SHARED, PRIVATE = 1, 2


@pytest.mark.parametrize("language", ["c", "c-static", "c-raw", "go", "python", "perl"])
def test_a_protection_that_is_not_enough(share, language):
    region = share.region()
    client = share.start(language)
    assert client.map(region.path, prot=READ) == -errno.EACCES
    assert client.ask("map", region.path, "rw", 0, 4 * PAGE, READ | WRITE).split()[0] in {
        "at",
        "mapped",
    }
    client.store(0, 1)


def test_a_private_mapping(share):
    region = share.region()
    client = share.start()
    assert client.call("open", region.path, "rw") > 0
    assert client.ask("mmap", 0, PAGE, READ | WRITE, 0, PRIVATE) == f"errno {errno.EINVAL}"
    assert client.ask("mmap", 0, PAGE, READ | WRITE, 0, SHARED).startswith("at ")
    client.store(0, 1)
    assert os.pread(region.fd, 1, 0) == b"\1"


def test_a_reader_of_a_region_that_is_only_read(share):
    """What is read-only throughout may be opened and mapped so, and gets no more rights then."""
    region = share.region(prot="r--")
    region.close()
    client = share.start()
    assert client.map(region.path, mode="r", prot=READ) == 0
    assert client.load(0) == 0
    assert client.fault_of("store", 0, 1) == client.address(0)
    share.regions[0] = region = Region.open(region.path)
    with pytest.raises(OSError) as caught:
        region.protect(0, PAGE, "rw-")
    assert caught.value.errno == errno.EBUSY
    region.protect(0, PAGE, "---")
    assert client.ranges() == [(0, 1, "---"), (1, 3, "r--")]
    assert client.fault_of("load", 0) == client.address(0)
    region.protect(0, PAGE, "r--")
    assert client.load(0) == 0


def obeys_with_the_next_change(share, region, client):
    region.protect(0, PAGE, "r--")
    client.path = region.path
    if share.tells:
        assert client.ranges() == [(0, 1, "r--"), (1, 3, "rw-")]
    assert client.load(0) == 0
    assert client.fault_of("store", 0, 1) == client.address(0)
    client.store(PAGE, 2)
    region.unmap(PAGE, PAGE)
    assert client.ranges()[-2:] == [(1, 1, "---"), (2, 2, "rw-")]
    assert share.states(region)[client.pid] in {"replica", "fault"}
    region.protect(0, PAGE, "rw-")
    client.store(0, 1)
    assert os.pread(region.fd, 1, 0) == b"\1"


def test_a_second_mmap_later(share):
    region = share.region()
    client = share.start()
    assert client.call("open", region.path, "rw") > 0
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    assert client.ask("munmap", 0, 4 * PAGE) == "result 0"
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    obeys_with_the_next_change(share, region, client)


def test_an_mmap_by_another_thread(share):
    region = share.region()
    client = share.start()
    assert client.call("open", region.path, "rw") > 0
    assert client.ask("mmap", 0, 4 * PAGE, 3, 1, SHARED).startswith("at ")
    obeys_with_the_next_change(share, region, client)


def test_an_mmap_of_a_duplicate(share):
    region = share.region()
    region.unmap(2 * PAGE, PAGE)
    client = share.start()
    assert client.call("open", region.path, "rw") > 0
    assert client.call("dup") > 0
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    region.map(2 * PAGE, PAGE, "rw-")
    obeys_with_the_next_change(share, region, client)


def test_a_descriptor_inherited_from_a_shell(share, built):
    """Redirection: the shell opens it, and becomes the program."""
    region = share.region()
    client = share.begin()
    client.close()
    share.clients.remove(client)
    shell = subprocess.Popen(
        ["sh", "-c", 'exec 7<>"$1"; exec "$2"', "sh", region.path, str(built("c") / "a.out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    client = type(client)("c", shell.stdout.fileno(), shell.stdin.fileno(), shell.pid)
    client.process = shell
    share.clients.append(client)
    client.ready()
    assert client.call("use", 7) == 7
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    obeys_with_the_next_change(share, region, client)


def test_a_descriptor_kept_over_exec(share):
    region = share.region()
    client = share.start()
    assert (fd := client.call("open", region.path, "rw")) > 0
    client.say("exec")
    client.ready()
    assert client.call("use", fd) == fd
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    obeys_with_the_next_change(share, region, client)


def test_a_descriptor_passed_over_a_socket(share, tmp_path):
    region = share.region()
    client = share.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client.say("receive", tmp_path / "s")
        giver, _ = listener.accept()
        with giver:
            fds = array.array("i", [region.fd])
            giver.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            word, _ = client.answer().split()
    assert word == "result"
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    obeys_with_the_next_change(share, region, client)


def test_who_was_not_seen_is_found_when_somebody_comes(share, tmp_path):
    """A census is taken at each open and close as well."""
    region = share.region()
    region.unmap(PAGE, PAGE)
    client = share.start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client.say("receive", tmp_path / "s")
        giver, _ = listener.accept()
        with giver:
            fds = array.array("i", [region.fd])
            giver.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            client.answer()
    assert client.ask("mmap", 0, 4 * PAGE, 3, 0, SHARED).startswith("at ")
    client.path = region.path
    with Region.open(region.path):
        pass
    until(lambda: client.ranges() == [(0, 1, "rw-"), (1, 1, "---"), (2, 2, "rw-")], "the census")
    assert client.fault_of("load", PAGE) == client.address(PAGE)


# -- those that cannot be made to obey


@contextlib.contextmanager
def strace(client):
    """Somebody else traces the program meanwhile."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing")
    command = ["strace", "-qq", "-e", "trace=none", "-o", "/dev/null", "-p", str(client.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until(lambda: tracers(client.pid) == {str(tracer.pid)}, "strace to attach")
        yield
    finally:
        tracer.terminate()
        tracer.wait()
    until(lambda: not tracers(client.pid), "strace to detach")


def test_best_lets_in_who_is_traced_and_tells(share_with):
    share = share_with("vma", "enforce=best")
    region = share.region()
    client = share.start()
    with strace(client):
        with connect(share.served.path).region("r").events(timeout=60) as events:
            assert client.map(region.path) == 0
            told = next(event for event in events if event["event"] == "unenforced")
        assert told["pid"] == client.pid
        assert "trace" in told["reason"]
        region.protect(0, PAGE, "r--")
        assert share.states(region) == {client.pid: "unenforced"}
        assert client.ranges() == [(0, 4, "rw-")]
    region.protect(PAGE, PAGE, "r--")  # and now it obeys
    assert client.ranges() == [(0, 2, "r--"), (2, 2, "rw-")]
    assert share.states(region) == {client.pid: "replica"}


def test_strict_refuses_who_is_traced(share_with):
    share = share_with("vma", "enforce=strict")
    region = share.region()
    client = share.start()
    with strace(client):
        assert client.map(region.path) == -errno.EPERM
    assert client.map(region.path) == 0


def test_strict_undoes_a_change_that_does_not_reach_everybody(share_with):
    share = share_with("vma", "enforce=strict")
    region = share.region()
    clients = [share.mapped(region) for _ in range(3)]
    with strace(clients[1]):
        with pytest.raises(OSError) as caught:
            region.protect(0, PAGE, "r--")
        assert caught.value.errno == errno.EPERM
        for client in clients:
            assert client.ranges() == [(0, 4, "rw-")]
            client.store(0, 1)
        assert [(m.start, m.size, m.prot.text()) for m in region] == [(0, 4 * PAGE, "rw-")]
    region.protect(0, PAGE, "r--")
    for client in clients:
        assert client.ranges() == [(0, 1, "r--"), (1, 3, "rw-")]


def test_a_region_whose_path_is_longer_than_a_page(share):
    """The kernel tells nobody a path of more than 4,096 bytes; the gate does without."""
    depth = 24
    parents = [os.open(share.served.path, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for _ in range(depth):
            os.mkdir("d" * 200, dir_fd=parents[-1])
            parents.append(os.open("d" * 200, os.O_RDONLY, dir_fd=parents[-1]))
        fd = os.open("r", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=parents[-1])
        with Region(fd, "r") as region:
            region.resize(4 * PAGE)
            region.map(0, 2 * PAGE, "rw-")
            with pytest.raises(OSError) as caught:
                mmap.mmap(fd, 4 * PAGE, mmap.MAP_PRIVATE)
            assert caught.value.errno == errno.EINVAL
            with mmap.mmap(fd, 4 * PAGE) as memory:
                memory[0] = 1
                region.protect(0, PAGE, "r--")
                with open("/dev/zero", "rb", buffering=0) as zeroes, memoryview(memory) as view:
                    with pytest.raises(OSError) as caught:
                        zeroes.readinto(view[:1])
                    assert caught.value.errno == errno.EFAULT
                    assert zeroes.readinto(view[PAGE : PAGE + 1]) == 1
                assert memory[0] == 1
    finally:
        for parent in reversed(parents):
            with contextlib.suppress(OSError):
                os.unlink("r", dir_fd=parent)
            with contextlib.suppress(OSError):
                os.rmdir("d" * 200, dir_fd=parent)
            os.close(parent)


def test_a_child_that_maps_what_it_inherited_after_it_was_seen(share):
    """Nobody has the region but its maker, who does not map it, and a child that was there before."""
    region = share.region()
    child, ours = socket.socketpair()
    with child, ours:
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                child.recv(1)
                memory = mmap.mmap(region.fd, 4 * PAGE)
                child.send(b"m")
                child.recv(1)
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                memory[0] = 1
            os._exit(0)
        try:
            region.protect(3 * PAGE, PAGE, "r--")  # the child maps nothing yet
            region.protect(3 * PAGE, PAGE, "rw-")
            ours.send(b"x")
            assert ours.recv(1) == b"m"
            region.protect(0, PAGE, "r--")
            ours.send(b"x")
        finally:
            status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
