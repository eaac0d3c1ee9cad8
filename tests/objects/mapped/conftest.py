"""Programs that map regions in which files lie."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from tests.enforcement.clients import PAGE
from tests.enforcement.conftest import built, gate, mounts, share_with  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.enforcement.clients import Client
    from tests.enforcement.conftest import Share


@pytest.fixture
def share(share_with) -> Share:  # noqa: F811
    return share_with("vma")


@pytest.fixture
def make(tmp_path) -> Iterator[Callable[..., int]]:
    """Files whose pages are each full of one letter, ``first`` and those after it."""
    made: list[int] = []

    def new(first: str = "a", pages: int = 8, kind: str = "disk") -> int:
        if kind == "memfd":
            fd = os.memfd_create("object")
        else:
            fd = os.open(tmp_path / f"object{len(made)}", os.O_RDWR | os.O_CREAT, 0o600)
        made.append(fd)
        os.write(fd, b"".join(bytes([ord(first) + page]) * PAGE for page in range(pages)))
        return fd

    yield new
    for fd in made:
        os.close(fd)


def text(client: Client, pages: int, first: int = 0) -> str:
    """The first byte of each page of the region, as the program sees it; "." for zero."""
    loaded = [client.load(page * PAGE) for page in range(first, first + pages)]
    return "".join(chr(byte) if byte else "." for byte in loaded)


def layout(share: Share, region, client: Client) -> list[tuple[int, int, str]]:
    """First page, pages, protection of each mapping that the ``clients`` file lists of a program."""
    found = []
    for line in share.listed(region):
        if int(line[0]) == client.pid:
            start, end = (int(part, 16) for part in line[1].split("-"))
            found.append((int(line[3], 16) // PAGE, (end - start) // PAGE, line[2][:3]))
    return found


def pinned(fd: int) -> bool:
    """Whether anybody but us has the file behind ``fd`` open or mapped. Source: F_SETLEASE(2const)."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return True
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
