"""Many regions, readers and processes at once; every answer is checked by replaying the event log.

``MSHAREFS_STRESS=full`` runs it at full size: 1,000 regions, 1,000 readers, 64 processes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys

from msharefs.abi import MapFlag, Prot
from msharefs.client import Region, parse_maps
from msharefs.region.region import Region as Model

FULL = os.environ.get("MSHAREFS_STRESS") == "full"
REGIONS = 1000 if FULL else 100
PROCESSES = 64 if FULL else 8
CHANGES = 1000 if FULL else 200
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


def test_many_of_everything_at_once(mount):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, REGIONS + 1000)), hard))
    rng = random.Random(1)
    with Region.create(mount.path / "first", PAGE) as region:
        region.map(0, PAGE, "rw-")
    before = mount.descriptors()
    readers = []
    for number in range(REGIONS):
        with Region.create(mount.path / f"r{number}", PAGES * PAGE) as region:
            region.map(rng.randrange(PAGES // 2) * PAGE, PAGE, "rw-")
        path = mount.path / ".control" / f"r{number}" / "events"
        readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    arguments = [str(number) for number in (REGIONS, CHANGES, PAGES)]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(mount.path), str(seed), *arguments])
        for seed in range(PROCESSES)
    ]
    try:
        assert [worker.wait(600) for worker in workers] == [0] * PROCESSES
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    changes = 0
    for number, reader in enumerate(readers):
        text = b""
        while True:
            try:
                text += os.read(reader, 1 << 20)
            except BlockingIOError:
                break
        os.close(reader)
        events = [json.loads(line) for line in text.splitlines()]
        assert not any(event["event"] == "overflow" for event in events)
        changes += sum(event["event"] in {"map", "unmap", "protect", "refuse"} for event in events)
        maps = (mount.path / ".control" / f"r{number}" / "maps").read_text()
        found = [(m.start, m.start + m.size, m.prot) for m in parse_maps(maps)]
        assert found == replay(events), f"r{number}"
        (mount.path / f"r{number}").unlink()
    assert changes == PROCESSES * CHANGES + REGIONS, "every call is in the log, once"
    while mount.descriptors() > before:
        os.listdir(mount.path)
