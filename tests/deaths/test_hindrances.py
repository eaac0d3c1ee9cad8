"""Processes that cannot be made to obey, or only with care: the documented result each time."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from msharefs.client import Region
from tests.deaths.conftest import PAGE, SIGSEGV, SIZE, does_not_come_in, status, until

FREEZERS = (
    ("/sys/fs/cgroup/freezer", "freezer.state", ("THAWED", "FROZEN")),
    ("/sys/fs/cgroup", "cgroup.freeze", ("0", "1")),
)


def change(at, prot="r--"):
    """The errno of a change of the second page; 0 if it went well."""
    try:
        at.region.protect(PAGE, PAGE, prot)
    except OSError as error:
        return error.errno
    return 0


def untouched(client):
    """Nothing has happened to it: every page can be written."""
    assert [client.store(page * PAGE) for page in range(16)] == ["ok"] * 16


@pytest.fixture
def pair(place, clients):
    """A place by the options, and a client in it that nothing hinders."""

    def make(options=""):
        at = place(options)
        return at, clients().map(at.path)

    return make


# -- traced by somebody else


def test_traced_before_it_opens_it_is_let_in_and_adopted_once_the_tracer_has_gone(pair, clients):
    at, good = pair()
    tracer, one = clients(), clients()
    assert tracer.do(f"trace {one.pid}") == "ok"
    one.map(at.path)
    reason = f"traced by process {tracer.pid}"
    assert at.event("unenforced")["reason"] == reason
    assert change(at) == 0
    assert at.standing(one.pid) == ("unenforced", reason)
    untouched(one)
    assert good.store(PAGE) == f"{SIGSEGV} {PAGE}"
    assert status(one.pid, "TracerPid") == str(tracer.pid)
    assert tracer.do(f"untrace {one.pid}") == "ok"
    at.obeys(one)
    assert one.store(PAGE) == f"{SIGSEGV} {PAGE}"
    assert at.standing(one.pid) == ("replica", "")
    one.end()


def test_traced_before_it_opens_it_is_refused_by_strict(pair, clients):
    at, good = pair("enforce=strict")
    tracer, one = clients(), clients()
    assert tracer.do(f"trace {one.pid}") == "ok"
    does_not_come_in(one, at.path)
    assert at.event("refuse")["reason"] == f"traced by process {tracer.pid}"
    at.obeys(good)
    assert tracer.do(f"untrace {one.pid}") == "ok"
    at.obeys(one.map(at.path))


@pytest.mark.parametrize("enforce", ["best", "strict"])
def test_traced_once_it_obeys(pair, clients, enforce):
    at, good = pair(f"enforce={enforce}")
    tracer, one = clients(), clients().map(at.path)
    assert tracer.do(f"trace {one.pid}") == "ok"
    at.events()
    if enforce == "best":
        assert change(at) == 0
        assert at.event("unenforced")["pid"] == one.pid
        untouched(one)
        assert good.store(PAGE) == f"{SIGSEGV} {PAGE}"
    else:
        assert change(at) == errno.EPERM
        assert at.region.query(PAGE).prot.text() == "rw-"
        untouched(one)
        untouched(good)
    # Undone, the table is what it was, and so is what the traced one has mapped.
    assert at.state(one.pid) == ("unenforced" if enforce == "best" else "replica")
    assert tracer.do(f"untrace {one.pid}") == "ok"
    at.obeys(one)
    at.obeys(good)
    assert at.state(one.pid) == "replica"
    one.end()


@pytest.mark.parametrize("tool", ["strace", "gdb"])
def test_a_tracer_that_people_use_attached_and_detached(pair, clients, tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is missing")
    at, _ = pair()
    one = clients().map(at.path)
    commands = {
        "strace": ["strace", "-f", "-o", "/dev/null", "-p", str(one.pid)],
        "gdb": ["gdb", "-q", "-nx", "-p", str(one.pid)],
    }
    with subprocess.Popen(
        commands[tool], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            until(lambda: status(one.pid, "TracerPid") == str(process.pid), f"{tool} to attach")
            if tool == "gdb":
                until(lambda: status(one.pid, "State").startswith("t"), "gdb to stop it")
            assert change(at) == 0
            assert at.standing(one.pid) == ("unenforced", f"traced by process {process.pid}")
            if tool == "gdb":
                process.stdin.write(b"detach\nquit\n")
                process.stdin.close()
            else:
                process.send_signal(signal.SIGINT)
            until(lambda: status(one.pid, "TracerPid") == "0", f"{tool} to detach")
        finally:
            if process.poll() is None and tool != "gdb":
                process.kill()
            process.stdout.read()
    at.obeys(one)
    one.end()


def test_a_program_started_by_strace(pair, clients):
    if not shutil.which("strace"):
        pytest.skip("strace is missing")
    at, good = pair()
    one = clients("strace", "-f", "-o", "/dev/null")
    one.map(at.path)
    assert change(at) == 0
    assert at.state(one.inner) == "unenforced"
    untouched(one)
    assert good.store(PAGE) == f"{SIGSEGV} {PAGE}"
    one.end()


# -- seccomp


@pytest.mark.parametrize("enforce", ["best", "strict"])
def test_a_filter_before_it_opens(pair, clients, enforce):
    at, good = pair(f"enforce={enforce}")
    one = clients()
    assert one.do("filter") == "ok"
    if enforce == "strict":
        does_not_come_in(one, at.path)
        assert at.event("refuse")["reason"] == "a seccomp filter is in force"
        at.obeys(good)
        return
    one.map(at.path)
    reason = "a seccomp filter is in force"
    assert at.event("unenforced")["reason"] == reason
    assert change(at) == 0
    assert at.standing(one.pid) == ("unenforced", reason)
    untouched(one)
    assert good.store(PAGE) == f"{SIGSEGV} {PAGE}"
    one.end()


@pytest.mark.parametrize("enforce", ["best", "strict"])
def test_a_filter_once_it_has_been_borrowed_is_suspended_for_that(pair, clients, enforce):
    at, good = pair(f"enforce={enforce}")
    one = clients().map(at.path)
    at.obeys(one)
    assert one.do("filter") == "ok"
    at.obeys(one)
    at.obeys(good)
    assert status(one.pid, "Seccomp") == "2"
    assert at.standing(one.pid) == ("replica", "")
    one.end()


# -- stopped, frozen, waiting


def test_stopped_by_sigstop_it_obeys_stays_stopped_and_nobody_hears_of_it(pair, clients):
    at, _ = pair()
    one = clients().map(at.path)
    os.kill(one.pid, signal.SIGSTOP)
    until(lambda: status(one.pid, "State").startswith("T"), "to be stopped")
    os.waitid(os.P_PID, one.pid, os.WSTOPPED)
    for _ in range(20):
        at.region.protect(PAGE, PAGE, "r--")
        at.region.protect(PAGE, PAGE, "rw-")
    at.region.protect(PAGE, PAGE, "r--")
    assert at.state(one.pid) == "replica"
    assert status(one.pid, "State").startswith("T (stopped)")
    assert (
        os.waitid(os.P_PID, one.pid, os.WSTOPPED | os.WCONTINUED | os.WEXITED | os.WNOHANG) is None
    )
    one.tell(f"store {PAGE} 1")
    os.kill(one.pid, signal.SIGCONT)
    assert one.hear() == f"{SIGSEGV} {PAGE}"
    one.end()


@pytest.fixture
def freezer():
    """A control group whose processes can be frozen: ``freezer(pid, True)``."""
    name = f"msharefs-test-{uuid.uuid4().hex}"
    usable = [
        f for f in FREEZERS if Path(f[0], "cgroup.procs").exists() and os.access(f[0], os.W_OK)
    ]
    if not usable:
        pytest.skip("no freezer of control groups can be used")
    base, file, words = usable[0]
    group = Path(base, name)
    group.mkdir()

    def freeze(pid, frozen):
        if frozen:
            (group / "cgroup.procs").write_text(str(pid))
        (group / file).write_text(words[frozen])
        if file == "freezer.state":
            until(lambda: (group / file).read_text().strip() == words[frozen], words[frozen])
        elif frozen:
            until(lambda: "frozen 1" in (group / "cgroup.events").read_text(), "frozen")

    yield freeze
    (group / file).write_text(words[0])
    for pid in (group / "cgroup.procs").read_text().split():
        Path(base, "cgroup.procs").write_text(pid)
    until(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty")
    group.rmdir()


@pytest.mark.parametrize("enforce", ["best", "strict"])
def test_frozen_it_is_given_up_after_the_limit_and_holds_up_nobody_else(
    pair, clients, freezer, enforce
):
    at, good = pair(f"enforce={enforce}")
    one = clients().map(at.path)
    other = Region.create(at.served.path / "other", SIZE)
    other.map(0, SIZE, "rw-")
    freezer(one.pid, True)
    at.events()
    changing = clients()
    changing.open(at.path)
    changing.tell(f"protect {changing.fd} {PAGE} {PAGE} 1")
    # While that waits, the one that can obey does, and other regions are served.
    until(lambda: good.store(PAGE) == f"{SIGSEGV} {PAGE}", "the other one to obey")
    other.protect(0, PAGE, "r--")
    other.close()
    late = clients().map(at.path)  # who comes meanwhile gets no more than the change will leave
    assert late.store(PAGE) == f"{SIGSEGV} {PAGE}"
    answer = changing.hear()
    told = [event for event in at.events("unenforced") if event["pid"] == one.pid]
    assert {"in time" in event["reason"] for event in told} == {True}, told
    if enforce == "best":
        assert answer == "ok"
        assert good.store(PAGE) == late.store(PAGE) == f"{SIGSEGV} {PAGE}"
    else:
        assert answer == f"-{errno.ETIMEDOUT}"
        assert good.store(PAGE) == late.store(PAGE) == "ok"
        assert at.region.query(PAGE).prot.text() == "rw-"
    assert at.state(one.pid) == ("unenforced" if enforce == "best" else "replica")
    freezer(one.pid, False)
    at.obeys(one)
    at.obeys(good)
    at.obeys(late)
    until(lambda: status(one.pid, "TracerPid") == "0", "to be let go")
    assert at.state(one.pid) == "replica"
    one.end()


def test_in_vfork_the_parent_waits_and_both_obey(pair, clients):
    at, _ = pair()
    one = clients().map(at.path)
    child = int(one.do("vfork"))
    assert child != one.pid
    at.obeys(one)
    assert at.state(one.pid) == "replica"
    assert one.do("return") == "ok"
    at.obeys(one)
    one.end()


# -- other worlds


def need_namespaces():
    """unshare(1) makes the root private first, which in a chroot is no mount point."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is missing")
    tried = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("unshare cannot make a mount namespace here: the root is no mount point")


def test_a_pid_namespace_that_nests_in_ours_is_adopted_as_any_other(pair, clients):
    need_namespaces()
    at, _ = pair()
    one = clients("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    assert one.inner == 1
    one.map(at.path)
    (pid,) = {event["pid"] for event in at.events("adopt")} - {1} - {_.pid}
    assert status(pid, "NSpid").split() == [str(pid), "1"]
    at.obeys(one)
    assert at.state(pid) == "replica"
    one.end()


@pytest.fixture
def inside(tmp_path):
    """A server in a pid namespace of its own, which therefore cannot see us; its directory for us."""
    need_namespaces()
    started = []

    def start(enforce):
        place = tmp_path / "inside"
        place.mkdir()
        readable, writable = os.pipe()
        options = f"log={tmp_path / 'log'},gate=ptrace,enforce={enforce}"
        command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m"]
        command += ["msharefs.cli.server", f"--ready-fd={writable}", "-o", options, "test"]
        process = subprocess.Popen([*command, str(place)], pass_fds=[writable])
        os.close(writable)
        assert os.read(readable, 6) == b"ready\n", (tmp_path / "log").read_text()
        os.close(readable)
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        started.append((process, int(tasks)))
        return Path(f"/proc/{int(tasks)}/root{place}")

    yield start
    for process, server in started:
        os.kill(server, signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_pid_namespace_that_is_foreign_to_the_server_best(inside, clients):
    served, one = inside("best"), clients()
    fd = one.open(served / "r", os.O_RDWR | os.O_CREAT)
    assert fd >= 0
    with Region.open(served / "r") as region:
        region.resize(SIZE)
        region.map(0, SIZE, "rw-")
        assert one.do(f"map {fd} {SIZE} 0 3") == "ok"
        region.protect(PAGE, PAGE, "r--")
        untouched(one)
        events = os.open(served / ".control/events", os.O_RDONLY | os.O_NONBLOCK)
        text = os.read(events, 1 << 16).decode()
        os.close(events)
    assert "the process lives in a foreign pid namespace" in text
    one.end()


def test_a_pid_namespace_that_is_foreign_to_the_server_strict(inside):
    served = inside("strict")
    with pytest.raises(OSError) as caught:
        os.open(served / "r", os.O_RDWR | os.O_CREAT)
    assert caught.value.errno == errno.EPERM


def test_chroot_and_a_mount_namespace(pair, clients):
    need_namespaces()
    at, _ = pair()
    one = clients("unshare", "--mount", "--propagation", "private")
    at.obeys(one.map(at.path))
    one.end()
    other = clients()
    assert other.do(f"chroot {at.served.path}") == "ok"
    at.obeys(other.map("/r"))
    other.end()


def test_another_user_is_held_at_the_gate_protected_and_watched(pair, clients):
    at, _ = pair()
    one = clients()
    assert one.open(at.path) >= 0
    where = f"/proc/self/fd/{one.fd}"
    assert one.do("user 65534") == "ok"
    one.map(where)
    # If its first open is being followed still, the census finds what it maps by the second one.
    until(lambda: at.state(one.pid) == "replica", "to be adopted")
    at.obeys(one)
    at.region.notify(3 * PAGE, PAGE)
    at.events()
    assert one.store(3 * PAGE + 5) == "ok"
    event = at.event("fault")
    assert (event["pid"], event["offset"], event["via"]) == (one.pid, 3 * PAGE + 5, "store")
    at.region.protect(3 * PAGE, PAGE, "r--")
    assert one.store(3 * PAGE + 6) == f"{SIGSEGV} {3 * PAGE + 6}"
    assert at.event("deny")["pid"] == one.pid
    at.region.protect(3 * PAGE, PAGE, "rw-")
    at.region.notify(3 * PAGE, PAGE)
    assert one.do(f"get {3 * PAGE}") in {"1", f"-{errno.EFAULT}"}
    one.end()


def test_a_32_bit_process_is_reported_and_never_harmed(pair, clients):
    at, good = pair()
    one = clients(program="client32").map(at.path)
    assert change(at) == 0
    assert at.standing(one.pid) == ("unenforced", "a 32-bit process")
    untouched(one)
    assert good.store(PAGE) == f"{SIGSEGV} {PAGE}"
    assert {event["reason"] for event in at.events("unenforced")} == {"a 32-bit process"}
    one.end()


def test_a_32_bit_process_is_refused_by_strict(pair, clients):
    at, good = pair("enforce=strict")
    one = clients(program="client32")
    does_not_come_in(one, at.path)
    at.obeys(good)
    one.end()


# -- at its limits


def test_no_descriptor_left_in_the_client(pair, clients):
    at, _ = pair()
    one = clients().map(at.path)
    assert one.do("nofile") == "ok"
    at.obeys(one)
    at.region.notify(3 * PAGE, PAGE)
    at.events()
    assert one.store(3 * PAGE) == "ok"
    at.region.protect(3 * PAGE, PAGE, "r--")
    assert one.store(3 * PAGE) == f"{SIGSEGV} {3 * PAGE}"
    one.end()


def test_no_mapping_left_in_the_client_the_change_is_undone_everywhere(pair, clients):
    at, good = pair()
    one = clients().map(at.path)
    assert one.do("fill") == "ok"
    assert change(at) == errno.ENOMEM
    assert at.region.query(PAGE).prot.text() == "rw-"
    untouched(one)
    untouched(good)
    at.region.protect(0, SIZE, "r--")  # no mapping has to be split for that
    assert one.store(0) == good.store(0) == f"{SIGSEGV} 0"
    one.end()
