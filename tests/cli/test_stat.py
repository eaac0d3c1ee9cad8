"""``mshare stat`` and ``mshare report`` of live regions with real clients."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from msharefs.client import Region

MIB = 1 << 20
CLIENT = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
size, touched = int(sys.argv[2]), int(sys.argv[3])
memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
for page in range(0, touched, 4096):
    memory[page] = 1
print("ready", flush=True)
sys.stdin.read()
"""


def run(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "msharefs.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert len(done.stderr.strip().splitlines()) == 1, "an error is one line"
    return done.stderr if status else done.stdout


@contextlib.contextmanager
def clients(path, size, *touched):
    """A process for each number: it maps the region and touches so many bytes. Their pids."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, path, str(size), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for number in touched
    ]
    try:
        for process in running:
            assert process.stdout.readline() == b"ready\n"
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def make(path, size):
    with Region.create(path, size=size) as region:
        region.map(0, size, "rw-")


def of_smaps(pid, path, key):
    """Sum over the mappings of the region, in bytes."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(f" {path}")
        elif ours and line.startswith(f"{key}:"):
            total += int(line.split()[1]) * 1024
    return total


def test_stat_has_a_line_for_each_client_and_agrees_with_smaps(mount):
    path = mount.path / "pool"
    make(path, 8 * MIB)
    with clients(path, 8 * MIB, 0, MIB, 8 * MIB) as pids:
        rows = {row["pid"]: row for row in json.loads(run("stat", path, "--json"))["clients"]}
        assert sorted(rows) == sorted(pids)
        for pid in pids:
            row = rows[pid]
            assert row["size"] == 8 * MIB
            assert row["present"] == of_smaps(pid, path, "Rss")
            assert row["pmd"] == of_smaps(pid, path, "ShmemPmdMapped") == 0
            status = Path(f"/proc/{pid}/status").read_text()
            assert row["vmpte"] == int(re.search(r"VmPTE:\s+(\d+) kB", status)[1]) * 1024
            assert row["tables"] <= row["vmpte"]
        assert [rows[pid]["present"] for pid in pids][::2] == [0, 8 * MIB]
        assert rows[pids[0]]["tables"] == 0
        assert rows[pids[2]]["tables"] >= (4 + 1 + 1) * 4096


def test_stat_shows_what_is_mapped_by_huge_pages(start_mount):
    mount = start_mount("huge=always")
    path = mount.path / "pool"
    make(path, 8 * MIB)
    with clients(path, 8 * MIB, 8 * MIB) as (pid,):
        (row,) = json.loads(run("stat", path, "--json", "-o", "+PTES"))["clients"]
        in_smaps = of_smaps(pid, path, "ShmemPmdMapped")
        if not in_smaps:
            pytest.skip("the kernel gave no huge page")
        assert row["pmd"] == in_smaps
        assert row["present"] == of_smaps(pid, path, "Rss") == 8 * MIB
        if row["pmd"] == row["present"]:
            assert row["ptes"] == 0


def test_the_table_is_for_people(mount):
    path = mount.path / "pool"
    make(path, 4 * MIB)
    assert run("stat", path, "--noheadings") == ""
    with clients(path, 4 * MIB, 4 * MIB) as (pid,):
        heading, line = run("stat", path).splitlines()
        assert heading.split() == ["PID", "COMM", "SIZE", "PRESENT", "PMD", "TABLES", "VMPTE"]
        assert line.split()[0] == str(pid)
        assert line.split()[2:5] == ["4M", "4M", "0B"]
        line = run("stat", path, "--noheadings", "--bytes", "-o", "size,present").strip()
        assert line.split() == [str(4 * MIB)] * 2
    assert json.loads(run("stat", path, "--json")) == {"clients": []}


def test_errors_have_their_status(mount):
    nowhere = mount.path / "nope"
    for command in ("stat", "report"):
        assert "no such region" in run(command, nowhere, status=3)
        assert "no column" in run(command, nowhere, "-o", "bogus", status=2)
        assert "the mount itself" in run(command, mount.path, status=2)
    for numbers in ("", "0", "1,,2", "x", "-1"):
        assert "not a list of numbers" in run("report", nowhere, "--clients", numbers, status=2)
    assert "neither in .svg" in run("report", nowhere, "--plot", "curve.pdf", status=2)


def test_report_measures_the_live_clients_and_models_any_number(mount, tmp_path):
    path = mount.path / "pool"
    make(path, 8 * MIB)
    with clients(path, 8 * MIB, 8 * MIB, 8 * MIB):
        listed = json.loads(run("stat", path, "--json"))["clients"]
        rows = json.loads(run("report", path, "--clients", "1500,2", "--json"))["report"]
        live, two, many = rows
        assert [row["clients"] for row in rows] == [2, 2, 1500]
        assert live["now"] == sum(row["tables"] for row in listed)
        assert live["vmpte"] == sum(row["vmpte"] for row in listed)
        assert live["present"] == two["present"] == 16 * MIB
        assert two["now"] == live["now"]
        assert two["small"] == live["small"] == 2 * 6 * 4096
        assert (many["small"], many["thp"]) == (1500 * 6 * 4096, 1500 * 2 * 4096)
        assert many["shared"] == two["shared"] == 6 * 4096
        assert many["vmpte"] is None
        heading, first, *_ = run("report", path).splitlines()
        assert heading.split()[:3] == ["WHAT", "CLIENTS", "PRESENT"]
        assert first.split()[:3] == ["live", "2", "16M"]
        picture = tmp_path / "curve.svg"
        if importlib.util.find_spec("matplotlib") is None:
            assert "pip install" in run("report", path, "--plot", picture, status=1)
        else:
            run("report", path, "--plot", picture)
            assert "<svg" in picture.read_text()
            run("report", path, "--plot", tmp_path / "missing" / "curve.svg", status=3)


def test_of_a_server_that_was_killed_nothing_is_known(mount):
    path = mount.path / "pool"
    make(path, 4 * MIB)
    mount.expect_exit = -signal.SIGKILL
    with clients(path, 4 * MIB, 4 * MIB):
        mount.stop(signal.SIGKILL)
        for command in ("stat", "report"):
            assert "the server has ended" in run(command, path, status=3)
    subprocess.run(["umount", "--lazy", mount.path], check=True)


def test_a_client_that_ends_leaves_the_list(mount):
    path = mount.path / "pool"
    make(path, 4 * MIB)
    with clients(path, 4 * MIB, 4 * MIB, 4 * MIB) as (first, second):
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        (row,) = json.loads(run("stat", path, "--json"))["clients"]
        assert row["pid"] == second
        assert json.loads(run("report", path, "--json"))["report"][0]["clients"] == 1


def test_huge_pages_are_asked_for_and_shown(start_mount):
    mount = start_mount("huge=advise")
    path = mount.path / "pool"
    run("create", path, "--size", "8M")
    run("map", path, "--anon", "--offset", "0", "--length", "2M", "--prot", "rw-")
    run("map", path, "--anon", "--offset", "4M", "--length", "4M", "--prot", "rw-", "--huge")
    asked = json.loads(run("query", path, "--json"))["mappings"]
    assert [(row["start"], row["kind"]) for row in asked] == [(0, "anon"), (4 * MIB, "huge")]
    with clients(path, 8 * MIB, 2 * MIB) as (pid,):
        assert of_smaps(pid, path, "ShmemPmdMapped") == 0, "that part has not asked"
    assert "--anon" in run(
        "map", path, "/bin/true", "--offset", "0", "--prot", "r--", "--huge", status=2
    )


def test_a_mount_without_huge_pages_says_how_to_have_them(mount):
    path = mount.path / "pool"
    make(path, 4 * MIB)
    said = run("map", path, "--anon", "--offset", "0", "--prot", "rw-", "--huge", status=1)
    assert "huge=advise" in said
