"""SQLite in WAL mode: its index is a shared mapping that grows, its locks are fcntl locks."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

ROUNDS = 150

WRITER = """
import sqlite3, sys
path, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
base = sqlite3.connect(path, timeout=60, isolation_level=None)
print("open", flush=True)
done = 0
while not rounds or done < rounds:
    base.execute("begin immediate")
    (total,) = base.execute("select value from total").fetchone()
    base.execute("update total set value = ?", (total + 1,))
    base.execute("insert into log values (?, ?, ?)", (name, done, "v" * 2000))
    base.execute("commit")
    done += 1
base.close()
"""


@pytest.fixture
def database(automap):
    path = automap.path / "base.db"
    base = sqlite3.connect(path, timeout=60, isolation_level=None)
    assert base.execute("pragma journal_mode = wal").fetchone() == ("wal",)
    base.execute("pragma mmap_size = 268435456")
    base.execute("pragma wal_autocheckpoint = 50")
    base.execute("create table total (value integer)")
    base.execute("insert into total values (0)")
    base.execute("create table log (name text, number integer, filler text)")
    yield base, path
    base.close()
    assert sorted(os.listdir(automap.path)) == [".control", "base.db", "mshare_info"]


def writer(path, name, rounds):
    command = [sys.executable, "-c", WRITER, str(path), name, str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def whole(base):
    assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
    (total,) = base.execute("select value from total").fetchone()
    (rows,) = base.execute("select count(*) from log").fetchone()
    assert total == rows
    return total


def test_processes_write_one_database(database):
    base, path = database
    writers = [writer(path, name, ROUNDS) for name in ("a", "b", "c")]
    while any(one.poll() is None for one in writers):
        base.execute("select count(*), max(number) from log group by name").fetchall()
    for one in writers:
        assert one.wait(120) == 0
        one.stdout.close()
    assert (path.parent / "base.db-shm").stat().st_size >= 32768
    assert whole(base) == 3 * ROUNDS
    assert base.execute("pragma wal_checkpoint(truncate)").fetchone()[0] == 0
    assert (path.parent / "base.db-wal").stat().st_size == 0
    assert whole(base) == 3 * ROUNDS


def test_a_writer_that_is_killed_is_rolled_back(database):
    base, path = database
    for _ in range(5):
        victim = writer(path, "victim", 0)
        assert victim.stdout.readline() == b"open\n"
        before = whole(base)
        while base.execute("select value from total").fetchone()[0] < before + 10:
            os.sched_yield()
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
        victim.stdout.close()
        assert whole(base) >= before + 10
    heir = writer(path, "heir", 5)
    assert heir.wait(60) == 0
    heir.stdout.close()
    assert base.execute("select count(*) from log where name = 'heir'").fetchone() == (5,)
    whole(base)
