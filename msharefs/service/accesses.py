"""Who is asked about the accesses that userfaultfds catch, and told of what becomes of clients.

For: :class:`msharefs.clients.faults.Faults`, which knows one :class:`Host`. What is to happen with
an access is for ``notifications.py`` to say; whom a forked child belongs to, for ``enforce.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msharefs.clients.faults import Access, Answer, Served
    from msharefs.service.enforce import Enforcer
    from msharefs.service.notifications import Notifications


class Accesses:
    """The host. ``enforcer`` is set before anything is served."""

    enforcer: Enforcer

    def __init__(self, notifications: Notifications) -> None:
        self._notifications = notifications

    def judge(self, access: Access) -> Answer:
        """By the table and the watches as they are."""
        return self._notifications.judge(access)

    def abandoned(self, served: Served, page: int) -> None:
        """Nobody waits for that page any more."""
        self._notifications.abandoned(served, page)

    def given_up(self, served: Served, page: int) -> None:
        """Who waited for that page goes on by the rules as they are now."""
        self._notifications.given_up(served, page)

    def forked(self, parent: Served, child: Served) -> None:
        """A child obeys as its parent does; the census will find out who it is."""

    def moved(self, served: Served) -> None:
        """What a client has mapped is looked at anew with each change."""

    def ended(self, served: Served, why: str) -> None:
        """Nothing is caught there any more."""
        self.enforcer.unserved(served, why)
