"""Mounts that protect in either way, and the program that looks at what it has mapped."""

from __future__ import annotations

from tests.enforcement.conftest import built, gate, mounts, share_with  # noqa: F401 - fixtures
