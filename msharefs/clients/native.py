"""The compiled module, where there is one: the only place that asks.

``present`` says whether; the functions may be used only then (see ``_native.pyi``). What they do
pure Python does as well, in several times the processor time.
"""

from __future__ import annotations

try:
    from msharefs.clients._native import (
        GONE,
        PENDING,
        SLOW,
        STUCK,
        borrow_many,
        carry_out_many,
        expected,
        look_at_many,
    )
except ImportError as error:
    present = False
    why = str(error)
else:
    present = True
    why = ""

__all__ = [
    "GONE",
    "PENDING",
    "SLOW",
    "STUCK",
    "borrow_many",
    "carry_out_many",
    "expected",
    "look_at_many",
    "present",
    "why",
]
