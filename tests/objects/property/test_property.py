"""Files, memory and holes at random in two regions, under the eyes of processes that come, fork and go.

After every step three things must be what a simple model says: which file and which part of it
each page of each process maps, with which protection (/proc/PID/maps); the bytes that each process
loads there, or the signal it gets instead; and the bytes of the files and regions as read(2) has
them.

MSHAREFS_TEST_EXAMPLES=N tries so many walks, others each time, instead of the few that are the same
each time.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.enforcement.clients import PAGE, until

if TYPE_CHECKING:
    from tests.enforcement.conftest import Share

PAGES = 8
FILE_PAGES = 5
CLIENTS = 4
MARK = 5
"""The byte of a page that is stored to; byte 0 says which page of which file it is."""
PROTS = ("---", "r--", "rw-")
EXAMPLES = int(os.environ.get("MSHAREFS_TEST_EXAMPLES", "0"))

ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES))
which = st.integers(0, 1)
byte = st.integers(1, 255)
any_of = st.integers(0, 1 << 16)
"""Picks one of however many there are."""


@attrs.define(eq=False)
class ModelFile:
    """A file and what it holds: bytes 0 and MARK of each page up to its end."""

    number: int
    fd: int
    pages: list[list[int]]

    def check(self):
        assert os.fstat(self.fd).st_size == len(self.pages) * PAGE
        data = os.pread(self.fd, (FILE_PAGES + 1) * PAGE, 0)
        assert [[data[at], data[at + MARK]] for at in range(0, len(data), PAGE)] == self.pages


@attrs.frozen
class Shown:
    """What a page of a region shows: page ``at`` of a file, or memory if ``file`` is None."""

    prot: str
    file: ModelFile | None = None
    at: int = 0
    writable: bool = True


@attrs.define(eq=False)
class ModelRegion:
    """A region: what each page shows (None is a hole), and its memory."""

    region: object
    ino: int
    pages: list[Shown | None] = attrs.Factory(lambda: [None] * PAGES)
    memory: list[list[int]] = attrs.Factory(lambda: [[0, 0] for _ in range(PAGES)])
    limit: int = PAGES

    def bytes_of(self, page):
        """Bytes 0 and MARK; None beyond the end of a file."""
        shown = self.pages[page]
        if shown is None or shown.file is None:
            return self.memory[page]
        return shown.file.pages[shown.at] if shown.at < len(shown.file.pages) else None

    def put(self, pages, make):
        for page in pages:
            self.pages[page] = make(page)
            self.memory[page] = [0, 0]

    @property
    def writable(self):
        return any(shown is not None and "w" in shown.prot for shown in self.pages)


class Viewer:
    """A process, and which page of which region it has at which address."""

    def __init__(self, client):
        self.client = client
        self.at = {}
        self.descriptors = []  # (region, whether it may only read), of those it keeps open
        self.reads = {}  # by address, of those pages that it may only read

    def reader_of(self, region):
        return any(one is region and only for one, only in self.descriptors) or any(
            self.at[address][0] is region for address in self.reads
        )

    def runs(self):
        """First address and pages of what lies side by side."""
        found = []
        for address in sorted(self.at):
            if found and found[-1][0] + found[-1][1] * PAGE == address:
                found[-1][1] += 1
            else:
                found.append([address, 1])
        return found


def codes(call, *arguments, **keywords):
    """0, or the errno of a call that fails."""
    try:
        call(*arguments, **keywords)
    except OSError as error:
        return error.errno
    return 0


class Machine(RuleBasedStateMachine):
    """Two regions, four files, and up to CLIENTS processes."""

    share: Share
    disk: Path
    number = 0

    @initialize()
    def begin(self):
        Machine.number += 1
        self.files = []
        for number in range(4):
            if number == 0:
                fd = os.memfd_create("object")
            else:
                place = self.disk if number < 3 else Path("/dev/shm")
                fd, name = tempfile.mkstemp(dir=place)
                os.unlink(name)
            marks = [16 * (number + 1) + page for page in range(FILE_PAGES)]
            os.write(fd, b"".join(bytes([mark]) + bytes(PAGE - 1) for mark in marks))
            self.files.append(ModelFile(number, fd, [[mark, 0] for mark in marks]))
        self.regions = []
        for name in ("a", "b"):
            region = self.share.region(PAGES, name=f"{name}{Machine.number}", prot="")
            self.regions.append(ModelRegion(region, os.fstat(region.fd).st_ino))
        self.device = os.fstat(self.regions[0].region.fd).st_dev
        self.placements = {}
        self.viewers = []
        self.join(0, (0, PAGES), "rw", "keep")

    # -- changes of regions

    def changed(self, region, prot, allowed, call, *arguments, **keywords):
        """Make a change; whether it was made, which ``allowed`` (errnos that it may have) says."""
        readers = any(viewer.reader_of(region) for viewer in self.viewers)
        if "w" in prot and readers:
            allowed = {*allowed, errno.EBUSY}
        code = codes(call, *arguments, **keywords)
        if "w" in prot and code == errno.EBUSY and not readers:
            # Somebody has gone whose going is not yet known.
            found = []
            until(
                lambda: found.append(codes(call, *arguments, **keywords)) or found[-1] != code,
                "readers to be forgotten",
            )
            code = found[-1]
        assert (code in allowed) if allowed else not code, (os.strerror(code), allowed)
        return not code

    def within(self, region, where):
        start = min(where[0], region.limit - 1)
        return range(start, min(sum(where), region.limit))

    @rule(which=which, where=ranges, prot=st.sampled_from(PROTS))
    def create_memory(self, which, where, prot):
        region = self.regions[which]
        pages = self.within(region, where)
        offset, size = pages[0] * PAGE, len(pages) * PAGE
        if self.changed(region, prot, (), region.region.map, offset, size, prot):
            region.put(pages, lambda _: Shown(prot))

    @rule(
        which=which,
        where=ranges,
        prot=st.sampled_from(PROTS),
        number=st.integers(0, 3),
        at=st.integers(0, FILE_PAGES),
        writable=st.booleans(),
    )
    def create_file(self, which, where, prot, number, at, writable):
        region, file = self.regions[which], self.files[number]
        pages = self.within(region, where)
        offset, size = pages[0] * PAGE, len(pages) * PAGE
        allowed = {errno.EACCES} if "w" in prot and not writable else ()
        fd = os.open(f"/proc/self/fd/{file.fd}", os.O_RDWR if writable else os.O_RDONLY)
        try:
            made = self.changed(
                region,
                prot,
                allowed,
                lambda: region.region.map(offset, size, prot, fd=fd, object_offset=at * PAGE),
            )
        finally:
            os.close(fd)
        if made:
            region.put(pages, lambda page: Shown(prot, file, at + page - pages[0], writable))

    @rule(which=which, where=ranges, prot=st.sampled_from(PROTS))
    def protect(self, which, where, prot):
        region = self.regions[which]
        pages = self.within(region, where)
        shown = [region.pages[page] for page in pages]
        allowed = {errno.ENOMEM} if None in shown else set()
        if "w" in prot and any(one is not None and not one.writable for one in shown):
            allowed.add(errno.EACCES)
        offset, size = pages[0] * PAGE, len(pages) * PAGE
        if self.changed(region, prot, allowed, region.region.protect, offset, size, prot):
            for page in pages:
                region.pages[page] = attrs.evolve(region.pages[page], prot=prot)

    @rule(which=which, where=ranges)
    def unmap(self, which, where):
        region = self.regions[which]
        pages = self.within(region, where)
        region.region.unmap(pages[0] * PAGE, len(pages) * PAGE)
        region.put(pages, lambda _: None)

    @rule(which=which, limit=st.integers(1, PAGES))
    def resize(self, which, limit):
        region = self.regions[which]
        region.region.resize(limit * PAGE)
        region.put(range(limit, PAGES), lambda _: None)
        region.limit = limit

    # -- bytes

    @rule(number=st.integers(0, 3), size=st.integers(0, FILE_PAGES))
    def set_size_of_file(self, number, size):
        file = self.files[number]
        os.ftruncate(file.fd, size * PAGE)
        del file.pages[size:]
        file.pages += [[0, 0] for _ in range(size - len(file.pages))]

    @precondition(lambda self: any(file.pages for file in self.files))
    @rule(number=st.integers(0, 3), pick=any_of, value=byte)
    def write_to_file(self, number, pick, value):
        file = self.files[number]
        if file.pages:
            page = pick % len(file.pages)
            os.pwrite(file.fd, bytes([value]), page * PAGE + MARK)
            file.pages[page][1] = value

    @rule(which=which, page=st.integers(0, PAGES - 1), value=byte)
    def write_to_region(self, which, page, value):
        region = self.regions[which]
        page = min(page, region.limit - 1)
        wanted = self.refused(region, page, "w")
        assert codes(os.pwrite, region.region.fd, bytes([value]), page * PAGE + MARK) == wanted
        if not wanted:
            region.bytes_of(page)[1] = value

    @staticmethod
    def refused(region, page, right):
        """The errno of read(2) or write(2) there."""
        shown = region.pages[page]
        if shown is None:
            return errno.ENXIO
        if right not in shown.prot:
            return errno.EACCES
        return errno.ENXIO if region.bytes_of(page) is None else 0

    @staticmethod
    def signal(region, page, right):
        """How an access of a process ends, or ""."""
        shown = region.pages[page]
        if shown is None or right not in shown.prot:
            return "segv"
        return "bus" if region.bytes_of(page) is None else ""

    @precondition(lambda self: any(viewer.at for viewer in self.viewers))
    @rule(pick=any_of, value=byte)
    def store(self, pick, value):
        everywhere = [(viewer, address) for viewer in self.viewers for address in viewer.at]
        viewer, address = everywhere[pick % len(everywhere)]
        region, page = viewer.at[address]
        answer = viewer.client.ask("store", f"{address + MARK:x}", value)
        if signal := self.signal(region, page, "w"):
            assert answer == f"{signal} {address + MARK:x}"
        else:
            assert answer == "stored 0"
            region.bytes_of(page)[1] = value

    # -- processes

    @precondition(lambda self: len(self.viewers) < CLIENTS)
    @rule()
    def start(self):
        self.viewers.append(Viewer(self.share.start("viewer")))

    @rule(
        pick=any_of,
        where=ranges,
        mode=st.sampled_from(["rw", "rw", "r"]),
        after=st.sampled_from(["keep", "close"]),
    )
    def map(self, pick, where, mode, after):
        if not self.viewers:
            self.start()
        self.map_in(self.viewers[pick % len(self.viewers)], pick & 1, where, mode, after)

    @precondition(lambda self: len(self.viewers) < CLIENTS)
    @rule(which=which, where=ranges, mode=st.sampled_from(["rw", "r"]), after=st.just("close"))
    def join(self, which, where, mode, after):
        self.start()
        self.map_in(self.viewers[-1], which, where, mode, after)

    def map_in(self, viewer, which, where, mode, after):
        region, first = self.regions[which], where[0]
        count = min(where[1], PAGES - first)
        prot = 3 if mode == "rw" else 1
        path = region.region.path
        answer = viewer.client.ask("map", path, mode, first * PAGE, count * PAGE, prot, after)
        if mode == "r" and region.writable:
            assert answer == f"errno {errno.EACCES}"
            return
        word, address = answer.split()
        assert word == "at", answer
        if after == "keep":
            viewer.descriptors.append((region, mode == "r"))
        for page in range(first, first + count):
            there = int(address, 16) + (page - first) * PAGE
            viewer.at[there] = region, page
            if mode == "r":
                viewer.reads[there] = True

    @precondition(lambda self: any(viewer.at for viewer in self.viewers))
    @rule(pick=any_of, first=st.integers(0, PAGES), count=st.integers(1, PAGES))
    def munmap(self, pick, first, count):
        able = [viewer for viewer in self.viewers if viewer.at]
        viewer = able[pick % len(able)]
        runs = viewer.runs()
        address, pages = runs[pick % len(runs)]
        first = min(first, pages - 1)
        address, count = address + first * PAGE, min(count, pages - first)
        assert viewer.client.ask("munmap", f"{address:x}", count * PAGE) == "result 0"
        for page in range(count):
            del viewer.at[address + page * PAGE]
            viewer.reads.pop(address + page * PAGE, None)

    @precondition(lambda self: 0 < len(self.viewers) < CLIENTS)
    @rule(pick=any_of)
    def fork(self, pick):
        parent = self.viewers[pick % len(self.viewers)]
        child = Viewer(self.share.fork(parent.client))
        child.at, child.reads = dict(parent.at), dict(parent.reads)
        child.descriptors = list(parent.descriptors)
        self.viewers.append(child)

    @precondition(lambda self: self.viewers)
    @rule(pick=any_of)
    def become_another(self, pick):
        viewer = self.viewers[pick % len(self.viewers)]
        assert viewer.client.ask("exec") == f"ready {viewer.client.pid}"
        viewer.at, viewer.reads, viewer.descriptors = {}, {}, []

    @precondition(lambda self: len(self.viewers) > 1)
    @rule(pick=any_of)
    def leave(self, pick):
        viewer = self.viewers[pick % len(self.viewers)]
        if viewer.client.process is not None and any(
            other.client.process is None for other in self.viewers
        ):
            self.become_another(pick)  # somebody has to reap its children
            return
        self.viewers.remove(viewer)
        viewer.client.close()
        self.share.clients.remove(viewer.client)

    # -- what must be true

    @invariant()
    def everything_is_as_the_model_says(self):
        for file in self.files:
            file.check()
        for region in self.regions:
            self.check_region(region)
        for viewer in self.viewers:
            self.check_maps(viewer)
            self.check_bytes(viewer)

    def check_region(self, region):
        for page in range(region.limit):
            wanted = self.refused(region, page, "r")
            code = codes(os.pread, region.region.fd, 1, page * PAGE + MARK)
            assert code == wanted, (page, region.pages[page])
            if not wanted:
                seen = os.pread(region.region.fd, MARK + 1, page * PAGE)
                assert [seen[0], seen[MARK]] == region.bytes_of(page)
        assert os.pread(region.region.fd, 1, region.limit * PAGE) == b""

    def check_bytes(self, viewer):
        for address, count in viewer.runs():
            wanted = []
            for there in range(address, address + count * PAGE, PAGE):
                region, page = viewer.at[there]
                signal = self.signal(region, page, "r")
                first, mark = region.bytes_of(page) or (0, 0)
                wanted.append(signal or str(first << 8 | mark))
            assert viewer.client.ask("look", f"{address:x}", count).split() == ["seen", *wanted]

    def check_maps(self, viewer):
        device = f"{os.major(self.device):02x}:{os.minor(self.device):02x}"
        found = {}
        for line in Path(f"/proc/{viewer.client.pid}/maps").read_text().splitlines():
            addresses, prot, offset, where, inode = line.split()[:5]
            if where != device:
                continue
            assert prot[3] == "s"
            start, end = (int(part, 16) for part in addresses.split("-"))
            for address in range(start, end, PAGE):
                found[address] = prot[:3], int(inode), (int(offset, 16) + address - start) // PAGE
        assert found.keys() == viewer.at.keys()
        for address, (prot, inode, at) in found.items():
            region, page = viewer.at[address]
            shown = region.pages[page]
            if self.share.tells:
                assert prot == (shown.prot if shown is not None else "---"), (page, shown)
            file = shown.file if shown is not None else None
            assert at == (page if file is None else shown.at), (page, shown)
            if inode != region.ino:
                # A file of .objects/ shows one file at one distance in one region, ever.
                showing = region, file, page - at
                assert self.placements.setdefault(inode, showing) == showing, (page, shown)
            else:
                assert file is None, (page, shown)

    def teardown(self):
        if hasattr(self, "regions"):
            self.share.close()
        for file in getattr(self, "files", ()):
            os.close(file.fd)


@pytest.fixture(params=["vma", "fault"])
def share(request, share_with):
    return share_with(request.param)


def test_everybody_sees_and_maps_what_the_model_says(share, tmp_path):
    with tempfile.TemporaryDirectory() as place:
        share.place = Path(place)
        machine = type("Bound", (Machine,), {"share": share, "disk": tmp_path})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES or 15,
                stateful_step_count=25,
                derandomize=not EXAMPLES,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
