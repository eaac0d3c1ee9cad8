"""scripts/bench says what it measures and leaves nothing behind. No figure is judged here."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"

CANNOT_MOUNT = next(
    (
        reason
        for missing, reason in (
            (os.geteuid() != 0, "needs root to mount"),
            (not Path("/dev/fuse").exists(), "needs /dev/fuse"),
            (shutil.which("cc") is None, "needs a C compiler (cc)"),
        )
        if missing
    ),
    None,
)
needs_a_mount = pytest.mark.skipif(CANNOT_MOUNT is not None, reason=str(CANNOT_MOUNT))


@pytest.fixture
def environment(tmp_path):
    """The scratch directory is ours to look at; afterwards it is empty and nothing is mounted."""
    yield {**os.environ, "TMPDIR": str(tmp_path)}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    left = [line.split()[4] for line in mounts if f"{tmp_path}/" in line]
    for directory in left:
        subprocess.run(["umount", "--lazy", directory], check=False)
    assert not left
    assert not list(tmp_path.iterdir())
    assert not processes_with(f"TMPDIR={tmp_path}")


def processes_with(variable: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
    return found


def bench(environment, *arguments):
    return subprocess.run(
        [sys.executable, BENCH, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_table_is_measured_at_three_sizes(environment):
    done = bench(environment, "--quick", "--only", "table")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress bar but on a terminal"
    assert "100,000" in done.stdout
    for operation in ("query", "protect", "unmap", "map"):
        assert f"\n {operation} " in done.stdout


@needs_a_mount
def test_all_parts_in_one_run(environment):
    done = bench(environment, "--quick")
    assert done.returncode == 0, done.stderr
    for words in ("Linux", "quick", "Table:", "Memory:", "Calls:"):
        assert words in done.stdout
    for row in ("first touch", "sequential read", "ioctl PROTECT", "ioctl INFO", "open + close"):
        assert f"\n {row} " in done.stdout


@needs_a_mount
def test_json_has_every_figure(environment):
    done = bench(environment, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["quick"] is True
    assert result["skipped"] == {}
    assert set(result["machine"]) == {"cpu", "cpus", "kernel", "python", "load"}
    assert {row["operation"] for row in result["table"]} >= {"query", "protect", "unmap", "map"}
    spreads = [spread for row in result["table"] for spread in row["us"].values()]
    assert {row["kind"] for row in result["memory"]} == {"touch", "write", "read"}
    spreads += [row[side] for row in result["memory"] for side in ("region", "memfd")]
    with_peer = {row["call"] for row in result["calls"] if row["plain_us"] is not None}
    assert with_peer == {"stat", "open_close"}
    assert {row["place"] for row in result["calls"]} == {"one CPU", "any CPU"}
    spreads += [row["us"] for row in result["calls"]]
    for spread in spreads:
        assert spread["count"] > 0
        assert 0 < spread["min"] <= spread["p50"] <= spread["p99"]
    for row in (*result["table"], *result["memory"]):
        assert row["ratio"] > 0


@needs_a_mount
def test_enforcement_has_every_figure(environment):
    done = bench(environment, "--quick", "--json", "--only", "enforce")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["enforce"]
    assert [(row["way"], row["pages"]) for row in result["protect"]] == [
        (way, pages) for pages in ("small", "huge") for way in ("vma", "fault", "auto")
    ]
    spreads = []
    for row in result["protect"]:
        assert row["clients"] > 0
        assert row["ratio"] > 0
        assert row["tables_kb"] >= 0
        spreads += [row[key] for key in ("us", "peer_us", "restore_us", "restore_peer_us")]
    for row in result["adopt"]:
        spreads += [*row["us"].values(), row["plain_us"]]
    assert {row["kind"] for row in result["memory"]} == {"touch", "write", "read"}
    kinds = ["store", "line", "plain", "caught", "scanned"]
    assert [row["until"] for row in result["fault"]] == kinds
    spreads += [row["us"] for row in result["fault"]]
    (rate,) = result["rate"]
    assert (rate["reported"], rate["lost"]) == (rate["stores"], 0)
    for spread in spreads:
        assert spread["count"] > 0
        assert 0 < spread["min"] <= spread["p50"] <= spread["p99"]


@needs_a_mount
def test_file_objects_have_every_figure(environment):
    done = bench(environment, "--quick", "--json", "--only", "objects")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["objects"]
    assert [(row["place"], row["clients"], row["size"] >> 20) for row in result["create"]] == [
        (place, clients, size)
        for place in ("disk", "memory")
        for clients in (1, 10)
        for size in (2, 32)
    ]
    spreads = [spread for row in result["create"] for spread in row["us"].values()]
    for row in result["create"]:
        assert set(row["us"]) == {"create", "first", "unmap", "mmap", "plain"}
    assert [(row["place"], row["kind"]) for row in result["access"]] == [
        (place, kind)
        for place in ("disk", "memory")
        for kind in ("touch", "read", "load", "write", "store")
    ]
    for row in result["access"]:
        assert row["ratio"] > 0
        assert 2 * row["pairs"] == row["region"]["count"] == row["plain"]["count"]
        spreads += [row["region"], row["plain"]]
    for spread in spreads:
        assert spread["count"] > 0
        assert 0 < spread["min"] <= spread["p50"] <= spread["p99"]


@needs_a_mount
def test_file_objects_are_shown_as_tables(environment):
    done = bench(environment, "--quick", "--only", "objects")
    assert done.returncode == 0, done.stderr
    for row in ("2 MiB, disk", "32 MiB, memory", "sequential read", "random stores"):
        assert f"\n {row} " in done.stdout


@needs_a_mount
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [("bench", "--only", "calls"), ("bench-pagetables", "--size", "256M", "--clients", "30")],
    ids=lambda command: command[0],
)
def test_stopped_half_way_it_takes_its_mounts_with_it(environment, tmp_path, command, number):
    name, *arguments = command
    with subprocess.Popen(
        [sys.executable, BENCH.with_name(name), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        with Path("/proc/self/mountinfo").open() as table:
            wait_until_listed(table, f"{tmp_path}/", running)
        running.send_signal(number)
        running.communicate(timeout=60)
    assert running.returncode != 0


def wait_until_listed(table, text, process):
    """Block until a mount appears, as proc_pid_mounts(5) has it: POLLPRI when the table changes."""
    poll = select.poll()
    poll.register(table, select.POLLPRI)
    ended = os.pidfd_open(process.pid)
    poll.register(ended, select.POLLIN)
    try:
        while text not in table.read():
            changed = poll.poll(60_000)
            assert changed, "nothing was mounted within a minute"
            assert all(fd != ended for fd, _ in changed), process.communicate()
            table.seek(0)
    finally:
        os.close(ended)


def test_what_cannot_be_measured_is_named(environment):
    done = bench(environment, "--only", "nothing")
    assert done.returncode == 2
    assert "'nothing' is not one of 'table', 'memory', 'calls'" in done.stderr


def page_tables(environment, *arguments):
    return subprocess.run(
        [sys.executable, BENCH.with_name("bench-pagetables"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_a_mount
def test_page_tables_against_the_number_of_clients(environment):
    done = page_tables(environment, "--quick", "--json", "--clients", "1,4")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress bar but on a terminal"
    result = json.loads(done.stdout)
    assert result["size"] == 64 << 20
    assert result["skipped"] == {}
    rows = result["rows"]
    assert [(row["pages"], row["clients"]) for row in rows] == [
        (pages, clients) for pages in ("small", "huge") for clients in (1, 4)
    ]
    for row in rows:
        assert row["present"] == row["clients"] * result["size"]
        assert row["vmpte"] >= row["derived"]
        assert row["shared"] == rows[0]["shared"] > 0
        if row["pages"] == "small":
            # A table for each 2 MiB, of which the kernel counts each; those above may be shared.
            assert 32 * 4096 <= row["grown"] / row["clients"] <= row["derived"] / row["clients"]


@needs_a_mount
def test_the_table_of_page_tables_says_what_it_holds_for(environment):
    done = page_tables(environment, "--size", "8M", "--clients", "2")
    assert done.returncode == 0, done.stderr
    for words in ("Linux", "region of 8M", "4 KiB pages", "huge=always", "VmPTE"):
        assert words in done.stdout


@needs_a_mount
def test_steps_that_do_not_fit_are_named(environment):
    done = page_tables(environment, "--size", "8M", "--clients", "1,1000000000")
    assert done.returncode == 0, done.stderr
    assert "left out: 1,000,000,000 clients need more memory than is free" in done.stdout
