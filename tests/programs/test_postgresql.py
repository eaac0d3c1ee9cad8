"""PostgreSQL with its dynamic shared memory on the mount, and a whole cluster on it.

Its parallel workers are processes of their own that meet in files of ``pg_dynshmem``: made, grown
by write(), mapped by all of them, and unlinked. Backends are killed while they do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time

import pytest

from tests.programs.postgres import PATIENCE, Cluster

BIG = "select count(*), sum(a.abalance + b.bid) from pgbench_accounts a join pgbench_accounts b"
BIG += " using (aid)"
SLOW = BIG.replace("using (aid)", "on a.aid % 7 = b.aid % 11")
"""Takes minutes, in several processes: to be killed."""


@pytest.fixture
def automap(reachable, start_mount):  # in this order: the mount goes first
    """As for the other programs, but where the user postgres gets."""
    return start_mount("automap,size=1G", reachable / "mnt")


@pytest.fixture
def cluster(automap, reachable, program):
    def tools(name):
        return program(name, "/usr/lib/postgresql/*/bin", package="postgresql")

    tools("initdb")
    made = Cluster(reachable / "data", tools)
    yield made
    made.stop()
    # Whatever happened: no memory of a cluster that has ended is left.
    dynamic = automap.path / "dynshmem"
    assert not dynamic.exists() or not os.listdir(dynamic)


@pytest.fixture
def on_mount(cluster, automap):
    """A started cluster whose dynamic shared memory is on the mount, with pgbench's tables."""
    cluster.make()
    cluster.move_dynamic_memory(automap.path / "dynshmem")
    cluster.start()
    cluster.pgbench("-i", "-q", "-s", "2")
    return cluster


def drained(events: int) -> bytes:
    """What there is to be read."""
    seen = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(events, 1 << 20):
            seen += more
    return seen


def workers_launched(plan: str) -> int:
    return sum(map(int, re.findall(r"Workers Launched: (\d+)", plan)))


def test_parallel_queries_meet_in_files_of_the_mount(on_mount, automap):
    events = os.open(automap.path / ".control" / "events", os.O_RDONLY | os.O_NONBLOCK)
    drained(events)
    plan = on_mount.ask(f"explain (analyze, costs off) {BIG}")
    assert workers_launched(plan) >= 2, plan
    assert "Parallel Hash" in plan, plan
    seen = [json.loads(line) for line in drained(events).splitlines()]
    os.close(events)
    made = {event["region"] for event in seen if event["event"] == "open" and event["created"]}
    gone = {event["region"] for event in seen if event["event"] == "unlink"}
    # Others come and go with the server's own affairs; these are what the query had for itself.
    assert made & gone
    assert all(name.startswith("dynshmem/mmap.") for name in made | gone)
    one_process = on_mount.ask(f"set max_parallel_workers_per_gather = 0; {BIG}")
    assert on_mount.ask(BIG) == one_process


def test_pgbench_runs(on_mount):
    transactions = on_mount.pgbench("-n", "-c", "4", "-j", "2", "-T", "3")
    assert "number of failed transactions: 0 " in transactions, transactions
    selects = on_mount.pgbench("-n", "-S", "-c", "4", "-j", "2", "-T", "2")
    assert "number of failed transactions: 0 " in selects, selects
    # Every transaction adds the same to the accounts as to the branches.
    sums = on_mount.ask(
        "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from"
        " pgbench_branches), (select count(*) from pgbench_history) > 0"
    )
    assert sums == "t|t"


def test_a_backend_that_is_killed_in_a_parallel_query_costs_a_restart_and_no_data(
    on_mount, automap
):
    before = on_mount.ask(BIG)
    slow = on_mount.asking(SLOW)
    dynamic = automap.path / "dynshmem"
    find = (
        "select pid from pg_stat_activity where backend_type = 'parallel worker'"
        " and query like '%aid % 11' limit 1"
    )
    deadline = time.monotonic() + PATIENCE
    while not (victim := on_mount.ask(f"set max_parallel_workers_per_gather = 0; {find}")):
        assert time.monotonic() < deadline, "no worker was started"
    inside = [name for name in os.listdir(dynamic) if name.startswith("mmap.")]
    assert inside
    clients = [
        (automap.path / ".control/dynshmem" / name / "clients").read_text() for name in inside
    ]
    pids = {line.split()[0] for line in "".join(clients).splitlines()}
    assert victim in pids, "the worker maps what is on the mount"
    on_mount.kill(int(victim))
    output, _ = slow.communicate(timeout=PATIENCE)
    assert slow.returncode != 0, output
    while "database system is ready" not in on_mount.log().partition("reinitializing")[2]:
        assert time.monotonic() < deadline, on_mount.log()
        time.sleep(0.05)  # nothing to wait on: the server says it in its log alone
    assert on_mount.ask(BIG) == before
    on_mount.stop()
    assert not os.listdir(dynamic)
    on_mount.start()
    assert on_mount.ask(BIG) == before


def test_a_whole_cluster_on_a_mount(reachable, start_mount, cluster):
    """The options are those that docs/automap.md advises for programs with many files."""
    place = start_mount("automap,io=native,private=allow", reachable / "whole").path
    inside = Cluster(place / "data", cluster.tools)
    inside.make(wal_init_zero="off", max_wal_size="64MB", min_wal_size="32MB")
    inside.start()
    try:
        inside.pgbench("-i", "-q", "-s", "1")
        inside.pgbench("-c", "2", "-T", "2")
        before = inside.ask("select sum(abalance) from pgbench_accounts"), inside.ask(BIG)
        inside.stop()
        inside.start()
        assert (inside.ask("select sum(abalance) from pgbench_accounts"), inside.ask(BIG)) == before
        assert workers_launched(inside.ask(f"explain (analyze, costs off) {BIG}")) >= 2
        # One table of PostgreSQL's is one mapping, as long as the file.
        table = inside.ask("select pg_relation_filepath('pgbench_accounts')")
        maps = (place / ".control" / "data" / table / "maps").read_text().splitlines()
        assert len(maps) == 1
        end = int(maps[0].split()[0].partition("-")[2], 16)
        assert end == (place / "data" / table).stat().st_size > 1 << 20
    finally:
        inside.stop()
