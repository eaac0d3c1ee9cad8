"""The server killed or ended while others are held, borrowed or wait: what becomes of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest

from msharefs.abi import NotifyMode
from msharefs.client import Region
from msharefs.service.mounts import unmount
from tests.conftest import GATE, is_mounted
from tests.deaths.conftest import PAGE, SIGSEGV, SIZE, status, until

HOLE = 8 * PAGE


def kill(served):
    served.process.kill()
    served.process.wait()
    served.expect_exit = -signal.SIGKILL


def free(client):
    """Nobody traces it, none of its threads is stopped for that."""
    for task in os.listdir(f"/proc/{client.pid}/task"):
        assert status(task, "TracerPid") == "0"
        assert status(task, "State")[0] in "SRD"


def gone(at):
    with pytest.raises(OSError) as caught:
        at.path.stat()
    assert caught.value.errno == errno.ENOTCONN
    assert is_mounted(at.served.path)
    unmount(at.served.path, detach=True)
    assert not is_mounted(at.served.path)


@pytest.fixture
def laid_out(place, clients):
    """Page 1 is r--, page 8 a hole, the rest rw-; a client that obeys."""

    def make(options="protect=vma"):
        at = place(options)
        at.region.protect(PAGE, PAGE, "r--")
        at.region.unmap(HOLE, PAGE)
        return at, clients().map(at.path)

    return make


def obeys_still(one):
    assert one.store(PAGE) == f"{SIGSEGV} {PAGE}"
    assert one.load(PAGE) == "0"
    assert one.load(HOLE) == f"{SIGSEGV} {HOLE}"
    assert one.store(0) == "ok"
    assert one.do(f"get {PAGE}") == f"-{errno.EFAULT}"


def test_killed_the_replicas_stay_in_force_and_a_new_mount_works(laid_out, start_mount, clients):
    at, one = laid_out()
    late = clients().map(at.path)
    at.region.protect(2 * PAGE, PAGE, "r--")
    kill(at.served)
    for client in (one, late):
        obeys_still(client)
        assert client.store(2 * PAGE) == f"{SIGSEGV} {2 * PAGE}"
        free(client)
    assert one.store(3 * PAGE, 42) == "ok"
    assert late.load(3 * PAGE) == "42", "they still share it"
    gone(at)
    at.served.path.rmdir()
    again = start_mount("gate=ptrace", at.served.path)
    with Region.create(again.path / "r", SIZE) as region:
        region.map(0, SIZE, "rw-")
        new = clients().map(again.path / "r")
        region.protect(PAGE, PAGE, "r--")
        assert new.store(PAGE) == f"{SIGSEGV} {PAGE}"
        assert one.store(4 * PAGE) == "ok"
        new.end()
    again.stop()
    for client in (one, late):
        client.end()


def test_killed_what_was_caught_by_faults_opens_up(laid_out):
    at, one = laid_out("protect=fault")
    at.region.protect(2 * PAGE, PAGE, "r--")
    at.region.notify(3 * PAGE, PAGE)
    assert one.store(2 * PAGE) == f"{SIGSEGV} {2 * PAGE}"
    kill(at.served)
    assert one.store(2 * PAGE) == "ok"
    assert one.store(3 * PAGE) == "ok"
    assert one.load(HOLE) == f"{SIGSEGV} {HOLE}", "holes are in the mappings themselves"
    free(one)
    one.end()
    gone(at)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_while_a_client_waits_in_a_held_fault_it_goes_on(laid_out, number):
    at, one = laid_out()
    at.region.notify(3 * PAGE, PAGE, mode=NotifyMode.HOLD)
    at.events()
    one.tell(f"store {3 * PAGE} 7")
    at.event("hold")
    end(at, number)
    assert one.hear() == "ok"
    assert one.load(3 * PAGE) == "7"
    free(one)
    one.end()


def end(at, number):
    if number == signal.SIGKILL:
        kill(at.served)
        gone(at)
    else:
        at.served.stop(number)
        assert not is_mounted(at.served.path)


@pytest.mark.skipif(GATE == "lsm", reason="that gate holds nobody at open()")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_while_openers_are_held(laid_out, clients, number):
    """A held thread is followed for a fifth of a second; of ten, some are held when it comes."""
    at, one = laid_out()
    openers = [clients() for _ in range(10)]
    for opener in openers:
        opener.tell(f"open {at.path} {os.O_RDWR}")
    until(lambda: any(status(o.pid, "TracerPid") != "0" for o in openers), "one to be held")
    end(at, number)
    answers = [int(opener.hear()) for opener in openers]
    refused = {errno.errorcode[-answer] for answer in answers if answer < 0}
    # ENOENT: under the mount point; EIO: the kernel's, for an open that crosses the end.
    assert refused <= {"ENOTCONN", "ECONNABORTED", "ENOENT", "EIO"}
    for opener in (*openers, one):
        until(lambda o=opener: status(o.pid, "TracerPid") == "0", "to be let go")
        free(opener)
        opener.end()


def test_ended_by_sigterm_while_a_storm_of_changes_borrows_everybody(laid_out, clients, programs):
    at, one = laid_out()
    many = [one, *(clients().map(at.path) for _ in range(9))]
    at.region.unmap(PAGE, PAGE)
    at.region.map(PAGE, PAGE, "rw-")
    at.region.map(HOLE, PAGE, "rw-")
    with subprocess.Popen(
        [programs("changer"), at.path, str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        until(lambda: any(status(c.pid, "TracerPid") != "0" for c in many), "one to be borrowed")
        at.served.stop()
        assert not is_mounted(at.served.path)
        process.stdin.close()
        _, error = map(int, process.stdout.readline().split())
        assert error in {errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV, errno.EINTR, 0}
    for client in many:
        free(client)
        assert client.store(0) == "ok"
        client.end()
