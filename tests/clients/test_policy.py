"""The choice between borrowing threads and write-protecting from outside."""

from __future__ import annotations

import pytest

from msharefs.clients.policy import MANY_CLIENTS, SMALL, Way, way


@pytest.mark.parametrize("choice", [Way.VMA, Way.FAULT])
@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("clients", [1, 300])
def test_a_choice_made_at_mounting_holds(choice, huge, clients):
    assert way(choice, 1 << 30, clients, huge=huge) is choice


def test_faults_serve_small_ranges_of_many_clients():
    assert way(Way.AUTO, SMALL, MANY_CLIENTS, huge=False) is Way.FAULT


@pytest.mark.parametrize(
    ("size", "clients", "huge"),
    [(SMALL + 1, 300, False), (SMALL, MANY_CLIENTS - 1, False), (4096, 300, True)],
)
def test_everything_else_is_left_to_the_kernel(size, clients, huge):
    assert way(Way.AUTO, size, clients, huge=huge) is Way.VMA
