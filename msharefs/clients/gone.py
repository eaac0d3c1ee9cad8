"""The one way to say that whom we were dealing with has ended."""

from __future__ import annotations


class Gone(Exception):
    """The process, the thread, or the address space that it had, is no more. Never an error."""
