"""Many regions, readers and processes at once; every answer is checked by replaying the event log.

``MSHAREFS_STRESS=full`` runs it at full size: 1,000 regions, 1,000 readers, 64 processes that make
1,000 changes each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
import sys
from itertools import pairwise

from msharefs.abi import MapFlag, Prot
from msharefs.client import Region, parse_maps
from msharefs.region.region import Region as Model

FULL = os.environ.get("MSHAREFS_STRESS") == "full"
REGIONS = 1000 if FULL else 100
PROCESSES = 64 if FULL else 8
CHANGES = 1000 if FULL else 100
EVENTS = 1000 if FULL else 100
"""More than any one region has."""
GROWTH = 3 << 20
"""Bytes that the server may be larger each time. A leak of one small object a call is more
than that in a full run; below it is what the allocator does with so many sizes."""
PAGE = 4096
PAGES = 64
FLAGS = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)

WORKER = """
import random, sys
from msharefs.client import Region
place, seed, regions, changes, pages = sys.argv[1], *map(int, sys.argv[2:])
rng = random.Random(seed)
expected = {"EINVAL", "ENOMEM", "EEXIST"}
for _ in range(changes):
    with Region.open(f"{place}/r{rng.randrange(regions)}") as region:
        offset = rng.randrange(pages) * 4096
        size = rng.randrange(1, pages // 4) * 4096
        prot = rng.choice(["r--", "rw-", "-w-", "---"])
        try:
            what = rng.randrange(4)
            if what == 0:
                region.map(offset, size, prot)
            elif what == 1:
                region.map(offset, size, prot, replace=False)
            elif what == 2:
                region.unmap(offset, size)
            else:
                region.protect(offset, size, prot)
        except OSError as error:
            import errno
            if errno.errorcode[error.errno] not in expected:
                raise
"""


def replay(events):
    """The region that its event log describes."""
    model = Model(1, "model")
    for event in events:
        offset, length = event["offset"], event["length"]
        prot = int(Prot.parse(event["prot"])) if "prot" in event else 0
        if event["event"] == "resize":
            model.apply_resize(model.plan_resize(length))
        elif event["event"] == "map":
            model.apply(model.plan_map(offset, length, prot, FLAGS))
        elif event["event"] == "unmap":
            model.apply(model.plan_unmap(offset, length))
        elif event["event"] == "protect":
            model.apply(model.plan_protect(offset, length, prot))
    return [(m.start, m.end, m.prot) for m in model.table]


def test_many_of_everything_at_once(start_mount):
    """Again and again on one mount, which must leave the server no larger each time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, REGIONS + 1000)), hard))
    # Each region's ring, a sixteenth of the mount's, holds all of its events; the mount's own is
    # full after the first time, and would go on growing otherwise.
    mount = start_mount(f"events={16 * EVENTS}")
    with Region.create(mount.path / "first", PAGE) as region:
        region.map(0, PAGE, "rw-")
    before = mount.descriptors()
    sizes = []
    for turn in range(3):
        everything_at_once(mount, turn)
        forget_events(mount)
        mount.until_descriptors(before)
        sizes.append(mount.memory())
    assert least_growth(sizes) < GROWTH, sizes


def forget_events(mount):
    """Fill the mount's ring anew: the events it holds are strewn over all the memory of a turn."""
    with Region.create(mount.path / "last", PAGE) as region:
        region.map(0, PAGE, "rw-")
        for _ in range(16 * EVENTS):
            os.pwrite(region.fd, b"x", 0)
    (mount.path / "last").unlink()


def least_growth(sizes):
    """A leak shows each time, while what an allocator happens to do does not."""
    return min(after - before for before, after in pairwise(sizes))


def everything_at_once(mount, turn):
    rng = random.Random(turn)
    readers = []
    for number in range(REGIONS):
        with Region.create(mount.path / f"r{number}", PAGES * PAGE) as region:
            region.map(rng.randrange(PAGES // 2) * PAGE, PAGE, "rw-")
        path = mount.path / ".control" / f"r{number}" / "events"
        readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    arguments = [str(number) for number in (REGIONS, CHANGES, PAGES)]
    seeds = range(turn * PROCESSES, (turn + 1) * PROCESSES)
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(mount.path), str(seed), *arguments])
        for seed in seeds
    ]
    try:
        assert [worker.wait(600) for worker in workers] == [0] * PROCESSES
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    changes = 0
    for number, reader in enumerate(readers):
        changes += checked(mount, number, reader)
        os.close(reader)
        (mount.path / f"r{number}").unlink()
    assert changes == PROCESSES * CHANGES + REGIONS, "every call is in the log, once"


def checked(mount, number, reader):
    """How many changes the log of a region holds; what it comes to must be what is mapped."""
    text = b""
    while True:
        try:
            text += os.read(reader, 1 << 20)
        except BlockingIOError:
            break
    events = [json.loads(line) for line in text.splitlines()]
    assert not any(event["event"] == "overflow" for event in events)
    maps = (mount.path / ".control" / f"r{number}" / "maps").read_text()
    found = [(m.start, m.start + m.size, m.prot) for m in parse_maps(maps)]
    assert found == replay(events), f"r{number}"
    return sum(event["event"] in {"map", "unmap", "protect", "refuse"} for event in events)


def test_the_server_keeps_nothing_of_what_is_over(start_mount):
    """The same things again and again: a few bytes a call, kept, would show."""
    mount = start_mount("events=160")

    def round_of_calls(number):
        path = mount.path / f"r{number}"
        with Region.create(path, 16 * PAGE) as region:
            region.map(0, 8 * PAGE, "rw-")
            reader = os.open(mount.path / ".control" / path.name / "events", os.O_RDONLY)
            for _ in range(10):
                region.protect(PAGE, PAGE, "r--")
                region.protect(PAGE, PAGE, "rw-")
                region.unmap(4 * PAGE, PAGE)
                region.map(4 * PAGE, PAGE, "rw-")
                region.query(0)
                os.pwrite(region.fd, b"x", 0)
                os.pread(region.fd, 1, 0)
                with contextlib.suppress(OSError):
                    region.protect(8 * PAGE, PAGE, "r--")
                with contextlib.suppress(OSError):
                    os.pwrite(region.fd, b"x", 8 * PAGE)
            os.read(reader, 1 << 16)
            os.close(reader)
            region.resize(PAGE)
        (mount.path / ".control" / path.name / "maps").read_text()
        path.unlink()

    round_of_calls(0)
    mount.until(lambda: len(os.listdir(mount.path)) == 2, "the first region is gone")
    before = mount.descriptors()
    sizes = []
    for _ in range(5):
        for number in range(30):
            round_of_calls(number)
        mount.until_descriptors(before)
        sizes.append(mount.memory())
    assert least_growth(sizes) < 16 * 1024, f"{sizes}: 3,000 calls came in between"
