"""How long a change looks for those who turn up while it is under way."""

from __future__ import annotations

import pytest

from msharefs.clients.roster import Attachment, State
from msharefs.service.layout import Layout
from msharefs.service.move import ROUNDS, Move

INODE = 16


class Client:
    def __init__(self):
        self.regions = {INODE: Attachment(INODE, State.REPLICA)}


class File:
    ino = INODE


class Arrivals:
    """Somebody new turns up each time that one looks. The first ``wrong`` do not obey yet."""

    def __init__(self, wrong):
        self.wrong = wrong
        self.moves = {}
        self.brought = []
        self.census_due = False

    async def bring(self, _file, clients, _layout, _before=(), **_):
        self.brought += clients
        self.wrong -= len(clients)
        return bool(clients) and self.wrong >= 0

    async def newcomers(self, _file, known):
        assert set(self.brought) == set(known)
        return [Client()]

    def look_around(self):
        self.census_due = True


@pytest.mark.parametrize("wrong", [0, 1, 2, 7])
async def test_a_stream_of_those_who_obey_ends_it(wrong):
    """Whoever was there is gone through, then those who did not obey yet, and one who does."""
    enforcer = Arrivals(1 + wrong)
    move = Move(enforcer, File, Layout([], []), Layout([], []), [Client()])
    await move.narrow()
    assert len(enforcer.brought) == 1 + wrong + 1
    assert set(move.clients) == set(enforcer.brought)
    assert not enforcer.census_due


async def test_a_stream_of_those_who_do_not_obey_is_left_to_the_census_in_the_end():
    enforcer = Arrivals(10**6)
    move = Move(enforcer, File, Layout([], []), Layout([], []), [Client()])
    await move.narrow()
    assert len(enforcer.brought) == ROUNDS
    assert enforcer.census_due
