"""What happened in a region, as values.

An event says what, where and who; the log that keeps events gives it a sequence number and a
time. The field names are those of the JSON lines in ``.control/**/events``.
"""

from __future__ import annotations

from enum import StrEnum

import attrs


class EventKind(StrEnum):
    """The ``event`` field."""

    OPEN = "open"
    REFUSE = "refuse"
    MAP = "map"
    UNMAP = "unmap"
    PROTECT = "protect"
    RESIZE = "resize"
    WRITE = "write"
    UNLINK = "unlink"
    RENAME = "rename"
    NOTIFY = "notify"
    """A range is watched from now on, or not any more."""
    FAULT = "fault"
    """A watched access, let go."""
    DENY = "deny"
    """A watched access that the protection forbids: it did not happen."""
    HOLD = "hold"
    """A watched access waits for ``allow SEQ`` or ``deny SEQ``, with this event's ``seq``."""
    RELEASE = "release"
    """It waits no more: ``hold`` is the number of the event above, ``decision`` what became of it,
    ``reason`` why."""
    ADOPT = "adopt"
    """A process has mapped the region and obeys its table from now on."""
    UNENFORCED = "unenforced"
    """A process maps the region, or may, that cannot be made to obey; the reason says why."""


@attrs.frozen
class Actor:
    """Who did it: process, thread and command name; zeroes where the kernel did not say."""

    pid: int = 0
    tid: int = 0
    comm: str = ""


NOBODY = Actor()


@attrs.frozen
class Event:
    """One thing that happened. ``offset`` and ``length`` in bytes; ``via`` is the call's name.

    ``detail`` holds what only some events have, in JSON's types: ``prot``, ``error``, ``reason``.
    """

    kind: EventKind
    region: str
    actor: Actor = NOBODY
    via: str = ""
    offset: int = 0
    length: int = 0
    detail: tuple[tuple[str, str | int], ...] = ()

    def fields(self) -> dict[str, str | int]:
        """The event's part of the JSON object, in the order it is printed."""
        return {
            "region": self.region,
            "event": str(self.kind),
            "offset": self.offset,
            "length": self.length,
            "pid": self.actor.pid,
            "tid": self.actor.tid,
            "comm": self.actor.comm,
            "via": self.via,
            **dict(self.detail),
        }
