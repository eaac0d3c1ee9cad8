"""Programs that touch, map and fork as they are told; all of them are gone after each test."""

from __future__ import annotations

import contextlib
import os
import tempfile

import pytest

from msharefs.clients import procmap
from tests.clients.puppet import Puppet
from tests.clients.touchers import start_toucher, toucher_program  # noqa: F401 - fixtures


@pytest.fixture
def puppets():
    """Start processes with these descriptors; afterwards they and their children have ended."""
    with contextlib.ExitStack() as stack:

        def start(*descriptors: int) -> Puppet:
            puppet = Puppet.start(*descriptors)
            stack.callback(puppet.close)
            return puppet

        yield start


@pytest.fixture
def shm():
    """A file of 64 pages on tmpfs, as good as a region for /proc: ``(descriptor, device, inode)``."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), 64 * 4096)
        status = os.fstat(file.fileno())
        yield file.fileno(), status.st_dev, status.st_ino


@pytest.fixture(params=["query", "text"])
def way(request, monkeypatch):
    """Both ways of reading /proc/PID/maps."""
    if request.param == "text":
        monkeypatch.setattr(procmap, "has_query", lambda: False)
        monkeypatch.setattr("msharefs.clients.space.has_query", lambda: False)
    elif not procmap.has_query():
        pytest.skip("PROCMAP_QUERY is missing (Linux 6.11)")
    return request.param
