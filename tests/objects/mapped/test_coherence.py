"""What a program sees of a file in a region is the file: at once, both ways, and nothing copied."""

from __future__ import annotations

import os

import pytest

from tests.enforcement.clients import PAGE
from tests.objects.mapped.conftest import layout, text

KINDS = ("disk", "memfd")
LANGUAGES = ("c", "c-raw", "python")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_who_maps_already_sees_the_file_when_the_call_returns(share, make, language, kind):
    region, fd = share.region(), make(kind=kind)
    client = share.mapped(region, language)
    client.store(0, 7)
    region.map(PAGE, 2 * PAGE, "rw-", fd=fd, object_offset=3 * PAGE)
    assert text(client, 4) == "\x07de."
    client.store(PAGE + 5, ord("S"))
    assert os.pread(fd, 1, 3 * PAGE + 5) == b"S"
    os.pwrite(fd, b"W", 4 * PAGE + 9)
    assert client.load(2 * PAGE + 9) == ord("W")
    assert os.pread(region.fd, 1, PAGE + 5) == b"S"
    assert layout(share, region, client) == [(0, 1, "rw-"), (1, 2, "rw-"), (3, 1, "rw-")]
    assert share.states(region) == {client.pid: "replica"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_who_comes_later_sees_it_from_the_first_moment(share, make, language, kind):
    region, fd = share.region(), make(kind=kind)
    region.map(2 * PAGE, PAGE, "rw-", fd=fd)
    client = share.mapped(region, language)
    assert text(client, 4) == "..a."
    client.store(2 * PAGE, ord("S"))
    assert os.pread(fd, 1, 0) == b"S"


def test_two_programs_and_the_file_are_one(share, make):
    region, fd = share.region(), make()
    one, other = share.mapped(region), share.mapped(region, "python")
    region.map(0, 4 * PAGE, "rw-", fd=fd)
    for page in range(4):
        one.store(page * PAGE, ord("A") + page)
        assert other.load(page * PAGE) == ord("A") + page
        assert os.pread(fd, 1, page * PAGE) == bytes([ord("A") + page])
