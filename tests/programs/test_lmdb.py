"""LMDB with ``writemap``: a sparse file that is stored to through mappings by several processes.

Its lock file is a mapping too, with robust mutexes in it, so a writer may be killed at any moment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

lmdb = pytest.importorskip("lmdb", reason="the Python package lmdb is missing")

SIZE = 64 << 20
ROUNDS = 200

COUNTER = """
import lmdb, sys
path, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
with lmdb.open(path, map_size=64 << 20, writemap=True, map_async=True) as env:
    print("open", flush=True)
    done = 0
    while not rounds or done < rounds:
        with env.begin(write=True) as txn:
            total = int(txn.get(b"total") or b"0") + 1
            txn.put(b"total", b"%d" % total)
            txn.put(f"{name}-{done}".encode(), b"v" * 1000)
        done += 1
"""


def counter(path, name, rounds):
    command = [sys.executable, "-c", COUNTER, str(path), name, str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def opened(path):
    return lmdb.open(str(path), map_size=SIZE, writemap=True)


def test_processes_write_one_database_through_their_mappings(automap):
    place = automap.path / "db"
    writers = [counter(place, name, ROUNDS) for name in ("a", "b", "c")]
    for writer in writers:
        assert writer.wait(120) == 0
        writer.stdout.close()
    with opened(place) as env, env.begin() as txn:
        assert txn.get(b"total") == b"%d" % (3 * ROUNDS)
        assert env.stat()["entries"] == 3 * ROUNDS + 1
        assert all(len(value) == 1000 for key, value in txn.cursor() if key != b"total")
    found = (place / "data.mdb").stat()
    assert found.st_size == SIZE
    assert found.st_blocks * 512 < SIZE // 4, "sparse"
    maps = (automap.path / ".control" / "db" / "data.mdb" / "maps").read_text()
    assert len(maps.splitlines()) == 1, "and one mapping all the same"


def test_a_writer_that_is_killed_leaves_a_database_that_others_go_on_with(automap):
    place = automap.path / "db"
    for _ in range(5):
        victim = counter(place, "victim", 0)
        assert victim.stdout.readline() == b"open\n"
        with opened(place) as env:
            before = int(env.begin().get(b"total") or b"0")
            while int(env.begin().get(b"total") or b"0") < before + 20:
                os.sched_yield()
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(60) == -signal.SIGKILL
        victim.stdout.close()
    heir = counter(place, "heir", 10)
    assert heir.wait(60) == 0
    heir.stdout.close()
    with opened(place) as env, env.begin() as txn:
        keys = [bytes(key) for key in txn.cursor().iternext(values=False)]
        assert len(keys) == env.stat()["entries"]
        assert {b"heir-%d" % number for number in range(10)} < set(keys)


def test_a_copy_made_while_it_is_used_is_whole(automap, tmp_path):
    place = automap.path / "db"
    with opened(place) as env:
        with env.begin(write=True) as txn:
            for number in range(500):
                txn.put(b"%d" % number, b"x" * 500)
        copy = tmp_path / "copy"
        copy.mkdir()
        env.copy(str(copy), compact=True)
    with lmdb.open(str(copy), map_size=SIZE, readonly=True) as env:
        assert env.stat()["entries"] == 500
