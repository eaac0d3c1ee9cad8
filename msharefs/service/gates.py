"""Which gate a mount gets: ``-o gate=``, and what this machine allows."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msharefs.clients.gate import GateUnavailable
from msharefs.clients.gate_lsm import LsmGate
from msharefs.memory import tmpfs

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


def open_gate(wanted: str, *, lenient: bool = True, private: bool = False) -> LsmGate | None:
    """The gate that ``-o gate=wanted`` asks for; None is none.

    ``auto`` takes the best that can be had. ``lenient`` and ``private`` as for `LsmGate`. Raises
    GateUnavailable for a kind that was asked for by name.
    """
    if wanted == "none":
        return None
    if wanted == "ptrace":
        raise GateUnavailable("this version has no ptrace gate")
    try:
        return open_lsm_gate(lenient=lenient, private=private)
    except GateUnavailable as error:
        if wanted == "lsm":
            raise
        log.debug("no lsm gate: %s", error)
    return None


def open_lsm_gate(*, lenient: bool, private: bool = False) -> LsmGate:
    """Raises GateUnavailable."""
    with _canary() as canary:
        return LsmGate.open(canary, lenient=lenient, private=private)


@contextmanager
def _canary() -> Iterator[int]:
    """A file on a device of its own, so that trying a gate out disturbs nobody."""
    try:
        directory = tmpfs.open_detached({})
    except OSError as error:
        raise GateUnavailable(f"no detached tmpfs ({error})") from error
    try:
        canary = tmpfs.unnamed_file(directory)
        try:
            yield canary
        finally:
            os.close(canary)
    finally:
        os.close(directory)
