"""Programs that have never heard of mshare, started as their packages ship them."""

from __future__ import annotations

import glob
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Served

LIMIT = "1G"


@pytest.fixture
def automap(start_mount) -> Served:
    """A mount for plain files, with a limit that a runaway program meets before the machine."""
    return start_mount(f"automap,size={LIMIT}")


@pytest.fixture
def program():
    """The path of a program, looked for on PATH and where Debian hides it; skips without it."""

    def find(name: str, *places: str, package: str = "") -> str:
        found = shutil.which(name)
        for place in places:
            found = found or next(iter(sorted(glob.glob(f"{place}/{name}"), reverse=True)), None)
        if found is None:
            pytest.skip(f"{name} is missing (Debian package {package or name})")
        return found

    return find


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A temporary directory that other users may pass through, as they may not through tmp_path."""
    above = Path(tempfile.gettempdir())
    made = Path(tempfile.mkdtemp(prefix="msharefs-programs-"))
    made.chmod(0o711)
    mode = above.stat().st_mode & 0o7777
    above.chmod(mode | 0o011)
    yield made
    above.chmod(mode)
    shutil.rmtree(made)


@pytest.fixture
def run():
    """Run a program to its end; its output is shown if it fails."""

    def start(*command: str | Path, timeout: float = 120, **named) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
            check=False,
            **named,
        )
        assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    return start
