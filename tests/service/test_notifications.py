"""Watched ranges on real mounts: programs that know nothing of it touch them, and die of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from msharefs.abi import NotifyEvent, NotifyMode, OnTimeout
from tests.clients.touchers import Toucher
from tests.conftest import GATE
from tests.watched import MIB, PAGE, PATIENCE, events_of

READ, WRITE = NotifyEvent.READ, NotifyEvent.WRITE
LOG, SIGNAL, HOLD = NotifyMode.LOG, NotifyMode.SIGNAL, NotifyMode.HOLD


@pytest.fixture
def mount(start_mount):
    return start_mount(f"gate={GATE or 'ptrace'}")


def do(toucher, command):
    toucher.tell(command)
    return toucher.hear()


def seen(event):
    return event["event"], event["via"], event["offset"], event["pid"]


def refused(code, call, *arguments):
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code


def decide(events, word, seq):
    return os.write(events.fd, f"{word} {seq}\n".encode())


# -- log


def test_each_page_is_reported_once_whoever_stores_to_it(region, events, start):
    one, other = start(), start()
    region.notify(PAGE, 2 * PAGE)
    assert do(one, "w 0") == "wrote 0"
    assert do(one, f"w {PAGE + 5}") == f"wrote {PAGE + 5}"
    event = events.next()
    assert seen(event) == ("fault", "store", PAGE + 5, one.pid)
    assert (event["region"], event["tid"], event["length"]) == ("r", one.pid, 1)
    assert (event["mode"], event["comm"]) == ("log", "toucher")
    do(one, f"w {PAGE}")
    do(other, f"w {PAGE}")
    do(other, f"r {2 * PAGE}")
    do(other, f"w {3 * PAGE}")
    events.none()
    do(other, f"w {2 * PAGE}")
    assert seen(events.next()) == ("fault", "store", 2 * PAGE, other.pid)
    region.notify(PAGE, 2 * PAGE)
    do(other, f"w {PAGE}")
    assert seen(events.next()) == ("fault", "store", PAGE, other.pid)
    region.notify(PAGE, 2 * PAGE, NotifyEvent.DISARM)
    do(one, f"w {2 * PAGE}")
    events.none()


def test_threads_at_once_system_calls_and_children(region, events, start):
    toucher = start()
    region.notify(0, MIB)
    assert do(toucher, "t 0") == "threads done"
    assert seen(events.next())[:3] == ("fault", "store", 0)
    assert do(toucher, f"k {PAGE}") == "call 100"
    assert seen(events.next()) == ("fault", "store", PAGE, toucher.pid)
    assert do(toucher, f"f {2 * PAGE}") == "child wrote"
    child = int(toucher.hear().split()[1])
    assert seen(events.next()) == ("fault", "store", 2 * PAGE, child)
    events.none()


def test_who_maps_it_later_is_watched_as_well(region, events, start):
    region.notify(0, PAGE)
    toucher = start()
    do(toucher, "w 7")
    assert seen(events.next()) == ("fault", "store", 7, toucher.pid)


def test_loads_are_reported_where_they_are_watched(region, events, start):
    toucher = start()
    do(toucher, "w 0")
    region.notify(0, 2 * PAGE, READ | WRITE)
    assert do(toucher, "r 0") == "read 42"
    assert seen(events.next()) == ("fault", "load", 0, toucher.pid)
    do(toucher, "r 1")
    events.none()
    do(toucher, "w 3")
    assert seen(events.next()) == ("fault", "store", 3, toucher.pid)
    assert do(toucher, f"p {PAGE}") == "call 100"
    assert seen(events.next()) == ("fault", "load", PAGE, toucher.pid)
    region.notify(0, 2 * PAGE, READ)
    assert do(toucher, "r 0") == "read 42"
    assert seen(events.next()) == ("fault", "load", 0, toucher.pid)
    assert region_bytes(region)[:5] == b"*\0\0*\0"


def region_bytes(region):
    return os.pread(region.fd, PAGE, 0)


UNPRIVILEGED = """
import os, sys
program = os.open(sys.argv[1], os.O_RDONLY)
os.chdir(sys.argv[2])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.execve(program, ["toucher", "r"], {})
"""


def test_a_program_without_privileges_has_its_own_stores_watched(
    mount, region, events, toucher_program
):
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("vm.unprivileged_userfaultfd lets everybody catch system calls")
    os.chmod(mount.path / "r", 0o666)
    region.notify(0, 2 * PAGE)
    command = [sys.executable, "-c", UNPRIVILEGED, toucher_program, mount.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        toucher = Toucher(process, *map(int, process.stdout.readline().split()))
        assert do(toucher, "w 3") == "wrote 3"
        assert seen(events.next()) == ("fault", "store", 3, toucher.pid)
        assert do(toucher, "k 0") == "call 100", "that page is open"
        assert do(toucher, f"k {PAGE}") == "call -1 EFAULT"
        assert do(toucher, f"p {PAGE}") == "call 100"
        events.none()
        process.kill()


def test_a_program_in_a_pid_namespace_of_its_own(mount, region, events, toucher_program):
    region.protect(PAGE, PAGE, "r--")
    region.notify(0, 2 * PAGE)
    command = ["unshare", "--pid", "--fork", "--kill-child", toucher_program, mount.path / "r"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        toucher = Toucher(process, *map(int, process.stdout.readline().split()))
        assert toucher.pid == 1, "by its own count"
        (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert do(toucher, "w 3") == "wrote 3"
        assert seen(events.next()) == ("fault", "store", 3, int(pid))
        assert do(toucher, f"l {PAGE}") == "jumped"
        assert seen(events.next()) == ("deny", "store", PAGE, int(pid))
        region.notify(0, PAGE)
        told = sorted([do(toucher, "h 5"), toucher.hear()])
        assert told[1] == "child wrote"
        child = events.next()
        assert seen(child)[:3] == ("fault", "store", 5)
        assert child["pid"] in map(
            int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        )
        process.kill()


def test_who_may_only_read_cannot_store_and_is_let_be(region, events):
    program = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "memory = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)\n"
        "print(memory[0], flush=True); input(); print(memory[0], flush=True)\n"
    )
    region.protect(0, MIB, "r--")
    command = [sys.executable, "-c", program, region.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"0\n"
        region.notify(0, PAGE)
        region.notify(0, PAGE, READ | WRITE)
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == b"0\n"
        assert reader.wait(PATIENCE) == 0
    events.none()


# -- denied


def test_a_store_to_a_watched_read_only_range_is_reported_and_denied(region, events, start):
    toucher = start()
    region.protect(0, MIB // 2, "r--")
    region.notify(0, 2 * PAGE)
    assert do(toucher, "r 0") == "read 0"
    for _ in range(2):
        assert do(toucher, "l 4321") == "jumped"
        event = events.next()
        assert seen(event) == ("deny", "store", 4321, toucher.pid)
        assert event["prot"] == "r--"
    assert do(toucher, "k 0") == "call -1 EFAULT"
    assert do(toucher, "p 0") == "call 100"
    assert do(toucher, f"l {2 * PAGE}") == "jumped", "denied where nobody watches, by the kernel"
    events.none()
    region.protect(0, PAGE, "rw-")
    assert do(toucher, "l 1") == "wrote 1"
    assert seen(events.next())[:3] == ("fault", "store", 1)
    assert do(toucher, "w 4321") == "signal 11 code 0 at 4321"
    assert seen(events.next())[:3] == ("deny", "store", 4321)
    assert toucher.process.wait(PATIENCE) == 3


def test_a_store_to_a_watched_range_without_any_right(region, events, start):
    toucher = start()
    region.protect(0, PAGE, "none")
    region.notify(0, PAGE)
    assert do(toucher, "l 8") == "jumped"
    assert seen(events.next()) == ("deny", "store", 8, toucher.pid)
    region.notify(0, PAGE, READ | WRITE)
    assert do(toucher, "k 0") == "call -1 EFAULT"
    assert do(toucher, "p 0") == "call -1 EFAULT"
    toucher.tell("r 16")
    assert toucher.hear() == "signal 11 code 0 at 16"
    assert seen(events.next()) == ("deny", "load", 16, toucher.pid)


# -- signal


def test_the_chosen_signal_comes_and_the_store_is_done(region, events, start):
    toucher = start()
    region.notify(0, 2 * PAGE, mode=SIGNAL, signo=signal.SIGALRM)
    assert do(toucher, "w 9") == "wrote 9"
    event = events.next()
    assert seen(event) == ("fault", "store", 9, toucher.pid)
    assert (event["mode"], event["signo"]) == ("signal", signal.SIGALRM)
    do(toucher, "w 10")
    assert do(toucher, "n") == "alarms 1"
    do(toucher, f"w {PAGE}")
    assert do(toucher, "n") == "alarms 2"
    events.next()
    events.none()


# -- hold


@pytest.mark.parametrize("word", ["allow", "deny"])
@pytest.mark.parametrize("of", ["r", "mount"])
def test_a_held_store_waits_for_a_word(mount, region, events, start, word, of):
    toucher = start()
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("l 12")
    event = events.next()
    assert seen(event) == ("hold", "store", 12, toucher.pid)
    assert (event["mode"], event["on_timeout"], event["timeout_ms"]) == ("hold", "deny", 0)
    assert region_bytes(region)[12] == 0
    seq = event["seq"]
    for nonsense in (b"perhaps %d", b"%d", b"allow %dx", b"allow deny %d"):
        refused(errno.EINVAL, os.write, events.fd, nonsense % seq)
    refused(errno.ENOENT, decide, events, word, seq + 1000)
    if of == "mount":
        with open(mount.path / ".control" / "events", "wb", buffering=0) as file:
            file.write(f"{word} {seq}".encode())
    else:
        decide(events, word, seq)
    assert toucher.hear() == ("wrote 12" if word == "allow" else "jumped")
    released = events.next()
    assert seen(released) == ("release", "store", 12, toucher.pid)
    assert (released["hold"], released["decision"]) == (seq, word)
    assert (released["reason"], released["by"]) == ("decided", os.getpid())
    refused(errno.ENOENT, decide, events, word, seq)
    if word == "allow":
        assert do(toucher, "l 13") == "wrote 13", "the page is open now"
        events.none()
    else:
        toucher.tell("l 13")
        decide(events, "allow", events.next()["seq"])
        assert toucher.hear() == "wrote 13"


@pytest.mark.parametrize("policy", list(OnTimeout))
def test_a_held_store_ends_by_the_policy_when_its_time_is_over(region, events, start, policy):
    toucher = start()
    region.notify(0, PAGE, mode=HOLD, timeout_ms=20, on_timeout=policy)
    assert do(toucher, "l 12") == ("wrote 12" if policy is OnTimeout.ALLOW else "jumped")
    assert events.next()["event"] == "hold"
    released = events.next()
    assert (released["decision"], released["reason"]) == (policy.name.lower(), "timeout")


@pytest.mark.parametrize("policy", list(OnTimeout))
def test_nobody_there_or_the_last_one_dies(mount, region, start, policy):
    toucher = start()
    region.notify(0, 2 * PAGE, mode=HOLD, on_timeout=policy)
    result = "wrote" if policy is OnTimeout.ALLOW else "jumped"
    assert do(toucher, "l 12").startswith(result)
    path = mount.path / ".control" / "r" / "events"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; f=open(sys.argv[1]); print(1, flush=True); input()",
            path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline()
        toucher.tell(f"l {PAGE}")
        wait_until(lambda: mount.stats("r")["hold"] == 2)
        holder.kill()
        holder.wait()
        assert toucher.hear().startswith(result)
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    with events_of(mount) as events:
        ends = [events.next() for _ in range(4)]
    assert [e["reason"] for e in ends if e["event"] == "release"] == ["nobody", "nobody"]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_who_waits_is_killed(region, events, start):
    toucher, other = start(), start()
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("w 12")
    seq = events.next()["seq"]
    toucher.process.kill()
    released = events.next()
    assert (released["hold"], released["decision"], released["reason"]) == (seq, "none", "gone")
    other.tell("w 13")
    decide(events, "allow", events.next()["seq"])
    assert other.hear() == "wrote 13"


def test_changes_have_who_waits_judged_again(region, events, start):
    toucher = start()
    for change, told, after in (
        (lambda: region.notify(0, PAGE, NotifyEvent.DISARM), "wrote 12", None),
        (lambda: region.notify(0, PAGE), "wrote 12", "fault"),
        (lambda: region.protect(0, PAGE, "r--"), "jumped", "deny"),
        (lambda: region.unmap(0, PAGE), "jumped", "deny"),
    ):
        region.map(0, PAGE, "rw-")
        region.notify(0, PAGE, mode=HOLD)
        toucher.tell("l 12")
        seq = events.next()["seq"]
        change()
        assert toucher.hear() == told
        released = events.next()
        assert (released["hold"], released["reason"]) == (seq, "changed")
        if after is not None:
            assert events.next()["event"] == after
        events.none()


def test_a_region_whose_name_goes_holds_on(mount, region, events, start):
    toucher = start()
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("w 12")
    seq = events.next()["seq"]
    (mount.path / "r").unlink()
    decide(events, "allow", seq)
    assert toucher.hear() == "wrote 12"


def test_the_server_is_killed_and_who_waits_goes_on(mount, region, events, start):
    toucher = start()
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("w 12")
    events.next()
    mount.expect_exit = -signal.SIGKILL
    mount.stop(signal.SIGKILL)
    assert toucher.hear() == "wrote 12"
    assert do(toucher, "w 4096") == "wrote 4096"
    subprocess.run(["umount", "--lazy", mount.path], check=True)


def test_the_server_ends_in_good_order_and_who_waits_goes_on(mount, region, events, start):
    toucher = start()
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("w 12")
    events.next()
    mount.stop()
    assert toucher.hear() == "wrote 12"


# -- calls on the file


def test_write_is_reported_and_denied_by_the_same_rules(region, events, start):
    fd = region.fd
    region.notify(PAGE, PAGE)
    assert os.pwrite(fd, b"x" * 3 * PAGE, 0) == 3 * PAGE
    event = events.next()
    assert seen(event) == ("fault", "write", PAGE, os.getpid())
    assert event["length"] == PAGE
    os.pwrite(fd, b"x", PAGE)
    events.none()
    region.protect(PAGE, PAGE, "r--")
    refused(errno.EACCES, os.pwrite, fd, b"x", PAGE + 1)
    assert seen(events.next()) == ("deny", "write", PAGE + 1, os.getpid())
    region.notify(PAGE, PAGE, READ)
    os.pread(fd, 10, PAGE)
    assert seen(events.next()) == ("fault", "read", PAGE, os.getpid())
    assert start


def in_thread(call):
    result = []

    def run():
        try:
            result.append(call())
        except OSError as error:
            result.append(error.errno)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_a_held_write_waits(region, events):
    region.notify(PAGE, PAGE, mode=HOLD)
    for word, offset, expected in (
        ("allow", PAGE, 10),
        ("deny", PAGE, errno.EACCES),
        ("deny", PAGE - 4, 4),
    ):
        thread, result = in_thread(
            lambda offset=offset: os.pwrite(region.fd, b"0123456789", offset)
        )
        event = events.next()
        assert seen(event)[:3] == ("hold", "write", PAGE)
        assert thread.is_alive()
        decide(events, word, event["seq"])
        thread.join(PATIENCE)
        assert result == [expected]
        assert events.next()["reason"] == "decided"


def test_a_held_writer_is_killed(mount, region, events):
    region.notify(0, PAGE, mode=HOLD)
    program = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'x', 0)"
    writer = subprocess.Popen([sys.executable, "-c", program, mount.path / "r"])
    try:
        assert seen(events.next()) == ("hold", "write", 0, writer.pid)
    finally:
        writer.kill()
        writer.wait()
    assert events.next()["reason"] == "gone"
    assert region_bytes(region)[0] == 0


# -- people


def test_only_who_may_write_the_region_may_decide(mount, region, events, start):
    toucher = start()
    os.chmod(mount.path / "r", 0o644)
    region.notify(0, PAGE, mode=HOLD)
    toucher.tell("w 12")
    seq = events.next()["seq"]
    program = (
        "import os, sys; os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534)\n"
        "os.close(os.open('events', os.O_RDONLY))\n"
        "try: os.open('events', os.O_WRONLY)\n"
        "except PermissionError: sys.exit(7)\n"
    )
    path = mount.path / ".control" / "r"
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode == 7
    decide(events, "allow", seq)
    assert toucher.hear() == "wrote 12"


def mshare(*arguments):
    command = [sys.executable, "-m", "msharefs.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, done.stdout, done.stderr


def test_by_the_command_line(mount, region, events, start):
    toucher, file = start(), mount.path / "r"
    assert mshare("notify", file, "--length", "4K", "--mode", "hold", "--timeout", "30")[0] == 0
    toucher.tell("w 12")
    event = events.next()
    assert event["timeout_ms"] == 30_000
    code, text, _ = mshare("watch", file, "--history", "--timeout", "0.1")
    assert code == 0
    assert f"hold {event['seq']} store at 0xc" in text
    assert mshare("decide", file, event["seq"], "allow") == (0, "", "")
    assert toucher.hear() == "wrote 12"
    assert mshare("decide", file, event["seq"], "allow")[0] == 4
    code, text, _ = mshare("clients", file, "--json", "-o", "PID,STATE,ARMED,FAULTS,COMM")
    found = json.loads(text)["clients"]
    assert all(client == found[0] for client in found), "a line for each piece of its mapping"
    assert found[0] == {
        "pid": toucher.pid,
        "state": "fault",
        "armed": 1,
        "faults": 1,
        "comm": "toucher",
    }
    assert mshare("notify", file, "--off")[0] == 0
    assert do(toucher, "w 12") == "wrote 12"
    assert mshare("notify", file, "--mode", "signal")[0] == 2
    assert mshare("notify", file, "--timeout", "1")[0] == 2


def test_many_stores_by_many_processes_are_all_reported(mount, region, events, start):
    touchers = [start() for _ in range(8)]
    before = mount.descriptors()
    for _ in range(3):
        region.notify(0, MIB)
        for number, toucher in enumerate(touchers):
            for page in range(number, MIB // PAGE, len(touchers)):
                toucher.tell(f"w {page * PAGE}")
        found = [events.next() for _ in range(MIB // PAGE)]
        assert sorted(event["offset"] for event in found) == list(range(0, MIB, PAGE))
        assert {event["pid"] for event in found} == {toucher.pid for toucher in touchers}
        for toucher in touchers:
            for _ in range(MIB // PAGE // len(touchers)):
                assert toucher.hear().startswith("wrote")
    events.none()
    for toucher in touchers:
        toucher.process.kill()
        toucher.process.wait()
    wait_until(lambda: mount.descriptors() < before)
    assert Path(f"/proc/{mount.process.pid}").exists()


STOPPED = """
import ctypes, os, sys
from msharefs.client import Region
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
def seize(tid):
    assert libc.ptrace(0x4206, tid, None, None) == 0
def stop_and_go(tid):
    assert libc.ptrace(0x4207, tid, None, None) == 0
    os.waitpid(tid, 0x40000000)
    assert libc.ptrace(7, tid, None, None) == 0
child = int(sys.argv[1])
seize(child)
print("seized", flush=True)
for line in sys.stdin:
    stop_and_go(child)
    print("stopped", flush=True)
"""

CHANGER = """
import sys
from msharefs.client import Region
with Region.open(sys.argv[1]) as region:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(30):
        region.notify(0, 4096)
print("done", flush=True)
"""


def test_a_tracer_s_stops_are_not_seen_by_who_asks_for_a_watch(mount, region, start):
    toucher = start()
    changer = subprocess.Popen(
        [sys.executable, "-c", CHANGER, mount.path / "r"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    tracer = None
    try:
        assert changer.stdout.readline() == b"ready\n"
        wait_until(lambda: "TracerPid:\t0" in Path(f"/proc/{changer.pid}/status").read_text())
        tracer = subprocess.Popen(
            [sys.executable, "-c", STOPPED, str(changer.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert tracer.stdout.readline() == b"seized\n"
        changer.stdin.write(b"\n")
        changer.stdin.flush()
        for _ in range(25):
            if changer.poll() is not None:
                break
            tracer.stdin.write(b"\n")
            tracer.stdin.flush()
            if tracer.stdout.readline() != b"stopped\n":
                break
        assert changer.stdout.readline() == b"done\n"
    finally:
        for process in (tracer, changer):  # a tracee is its tracer's to bury first
            if process is not None:
                process.kill()
                process.wait()
                process.stdin.close()
                process.stdout.close()
    assert do(toucher, "w 0") == "wrote 0"
