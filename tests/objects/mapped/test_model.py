"""Any sequence of changes, files and programs, against what each single page should show."""

from __future__ import annotations

import os
import random

import attrs
import pytest

from tests.enforcement.clients import PAGE
from tests.objects.mapped.conftest import layout

PAGES = 12
FILE_PAGES = 8
STEPS = 24
PROTS = ("rw-", "rw-", "r--", "---")


@attrs.define
class Page:
    """What lies in one page of the region; ``file`` is an index, -1 for memory."""

    prot: str
    file: int = -1
    page: int = 0
    byte: int = 0
    """The first byte of a page of memory; that of a file's is the file's."""


class World:
    """A region, three files, and the programs that map it; and a model of them."""

    def __init__(self, share, make, seed):
        self.share = share
        self.random = random.Random(seed)
        self.region = share.region(PAGES, prot="")
        self.fds = [make("a"), make("A", kind="memfd"), make("k")]
        self.files = [list(os.pread(fd, FILE_PAGES * PAGE, 0)[::PAGE]) for fd in self.fds]
        self.pages: list[Page | None] = [None] * PAGES
        self.clients = []

    def span(self):
        start = self.random.randrange(PAGES)
        return start, self.random.randint(start + 1, PAGES)

    # -- what may happen

    def memory(self):
        (start, end), prot = self.span(), self.random.choice(PROTS)
        self.region.map(start * PAGE, (end - start) * PAGE, prot)
        self.pages[start:end] = [Page(prot) for _ in range(end - start)]

    def file(self):
        (start, end), prot = self.span(), self.random.choice(PROTS)
        end = min(end, start + FILE_PAGES)
        index, first = self.random.randrange(3), self.random.randint(0, FILE_PAGES - (end - start))
        self.region.map(
            start * PAGE,
            (end - start) * PAGE,
            prot,
            fd=self.fds[index],
            object_offset=first * PAGE,
        )
        self.pages[start:end] = [Page(prot, index, first + n) for n in range(end - start)]

    def unmap(self):
        start, end = self.span()
        self.region.unmap(start * PAGE, (end - start) * PAGE)
        self.pages[start:end] = [None] * (end - start)

    def protect(self):
        (start, end), prot = self.span(), self.random.choice(PROTS)
        if None in self.pages[start:end]:
            with pytest.raises(OSError, match="memory"):
                self.region.protect(start * PAGE, (end - start) * PAGE, prot)
            return
        self.region.protect(start * PAGE, (end - start) * PAGE, prot)
        for page in self.pages[start:end]:
            page.prot = prot

    def come(self):
        if len(self.clients) < 4:
            self.clients.append(self.share.mapped(self.region, pages=PAGES))

    def fork(self):
        if self.clients and len(self.clients) < 5:
            self.clients.append(self.share.fork(self.random.choice(self.clients)))

    def go(self):
        if len(self.clients) > 2:
            client = self.clients.pop(self.random.randrange(len(self.clients)))
            self.share.clients.remove(client)
            client.close()

    def store(self):
        """By a program if the page lets it; else into the file itself."""
        number, byte = self.random.randrange(PAGES), self.random.randrange(1, 256)
        page = self.pages[number]
        if page is not None and page.prot == "rw-" and self.clients:
            self.random.choice(self.clients).store(number * PAGE, byte)
            if page.file < 0:
                page.byte = byte
            else:
                self.files[page.file][page.page] = byte
        else:
            index, at = self.random.randrange(3), self.random.randrange(FILE_PAGES)
            os.pwrite(self.fds[index], bytes([byte]), at * PAGE)
            self.files[index][at] = byte

    # -- what is to be seen

    def byte(self, page):
        return page.byte if page.file < 0 else self.files[page.file][page.page]

    def seen(self):
        """What a load of each page answers, without the address where it fails."""
        return [
            "segv" if page is None or page.prot == "---" else f"value {self.byte(page)}"
            for page in self.pages
        ]

    def protections(self, client):
        """Of each page, from the ``clients`` file."""
        found = {}
        for first, count, prot in layout(self.share, self.region, client):
            found.update(dict.fromkeys(range(first, first + count), prot))
        return [found.get(number) for number in range(PAGES)]

    def check(self):
        wanted = self.seen()
        for client in self.clients:
            answers = [client.ask("load", number * PAGE) for number in range(PAGES)]
            assert [a.split()[0] if a.startswith("segv") else a for a in answers] == wanted
            expected = ["---" if page is None else page.prot for page in self.pages]
            assert self.protections(client) == expected
        for index, fd in enumerate(self.fds):
            assert list(os.pread(fd, FILE_PAGES * PAGE, 0)[::PAGE]) == self.files[index]
        table = [None] * PAGES
        for mapping in self.region:
            for number in range(mapping.start // PAGE, (mapping.start + mapping.size) // PAGE):
                table[number] = mapping.prot.text()
        assert table == [page and page.prot for page in self.pages]


@pytest.mark.parametrize("seed", range(8))
def test_every_page_of_every_program_is_what_the_table_says(share, make, seed):
    world = World(share, make, seed)
    steps = [world.memory, world.file, world.file, world.unmap, world.protect, world.come]
    steps += [world.fork, world.go, world.store, world.store]
    world.come()
    for _ in range(STEPS):
        world.random.choice(steps)()
        world.check()
    world.unmap()  # a child that was forked just now has not been looked at since
    states = share.states(world.region)
    assert states == {client.pid: "replica" for client in world.clients}
