"""Which gate a mount gets: ``-o gate=``, and what this machine allows."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import attrs

from msharefs.abi import Gate
from msharefs.clients import arch
from msharefs.clients.gate import GateUnavailable
from msharefs.clients.gate_lsm import LsmGate
from msharefs.memory import tmpfs
from msharefs.service.tryout import try_ptrace

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


@attrs.frozen
class Opened:
    """A gate that is there. ``lsm`` has to be closed."""

    kind: Gate
    lsm: LsmGate | None = None


def open_gate(
    wanted: str, *, lenient: bool = True, private: bool = False, whole: bool = False
) -> Opened:
    """The gate that ``-o gate=wanted`` asks for.

    ``auto`` takes the best that can be had. ``lenient``, ``private`` and ``whole`` as for `LsmGate`.
    Raises GateUnavailable for a kind that was asked for by name.
    """
    lacks: list[str] = []
    if wanted in {"auto", "lsm"}:
        try:
            lsm = open_lsm_gate(lenient=lenient, private=private, whole=whole)
            return Opened(Gate.LSM, lsm)
        except GateUnavailable as error:
            if wanted == "lsm":
                raise
            lacks.append(f"lsm: {error}")
    if wanted in {"auto", "ptrace"}:
        try:
            check_ptrace()
        except GateUnavailable as error:
            if wanted == "ptrace":
                raise
            lacks.append(f"ptrace: {error}")
        else:
            return Opened(Gate.PTRACE)
    if wanted != "none":
        log.warning("no gate, so nothing is enforced in other processes (%s)", "; ".join(lacks))
    return Opened(Gate.NONE)


def check_ptrace() -> None:
    """Raises GateUnavailable if threads of other processes cannot be borrowed."""
    try:
        arch.require()
        try_ptrace()
    except OSError as error:
        raise GateUnavailable(error.strerror or str(error)) from error


def open_lsm_gate(*, lenient: bool, private: bool = False, whole: bool = False) -> LsmGate:
    """Raises GateUnavailable."""
    with _canary() as canary:
        return LsmGate.open(canary, lenient=lenient, private=private, whole=whole)


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
