"""A mount for each gate and way of protecting, programs on it, and a look at everything at the end."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from msharefs.client import Region
from tests.conftest import GATE, serving
from tests.enforcement.clients import PAGE, PATIENCE, Client, build, command_of, tracers, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Served


class Share:
    """A mount, its regions, and the programs that were started to map them."""

    def __init__(self, served: Served, way: str, place: Path, built: Callable[[str], Path]) -> None:
        self.served = served
        self.way = way
        self.place = place
        self.built = built
        self.regions: list[Region] = []
        self.clients: list[Client] = []
        self.descriptors = self._warmed_up()

    def _warmed_up(self) -> int:
        """How many descriptors the server holds when there is nothing to be held any more."""
        with Region.create(self.served.path / "first", PAGE) as region:
            region.map(0, PAGE, "rw-")
            region.protect(0, PAGE, "r--")
        os.unlink(region.path)
        seen = [-1]
        while len(set(seen[-8:])) != 1 or len(seen) < 8:
            os.listdir(self.served.path)
            seen.append(self.served.descriptors())
        return seen[-1]

    def let_go(self) -> None:
        """Until the server holds no more than when it had nothing to hold."""
        deadline = time.monotonic() + PATIENCE
        while self.served.descriptors() > self.descriptors:
            if time.monotonic() > deadline:
                place = Path(f"/proc/{self.served.process.pid}/fd")
                links = sorted(str(path.readlink()) for path in place.iterdir())
                raise AssertionError(f"{len(links)} not {self.descriptors}: {links}")
            os.listdir(self.served.path)  # each request may bring a FORGET before it
            time.sleep(0.01)

    @property
    def tells(self) -> bool:
        """Whether /proc/PID/maps shows what is read-only: faults leave mappings as they are."""
        return self.way == "vma"

    def region(self, pages: int = 4, name: str = "r", prot: str = "rw-") -> Region:
        region = Region.create(self.served.path / name, pages * PAGE)
        self.regions.append(region)
        if prot:
            region.map(0, pages * PAGE, prot)
        return region

    def begin(self, language: str = "c", *, pass_fds: tuple[int, ...] = ()) -> Client:
        errors = self.place / f"hs_err.{len(self.clients)}"
        command = command_of(language, self.built, errors)
        self.clients.append(Client.start(command, language, errors, pass_fds))
        return self.clients[-1]

    def start(self, language: str = "c", *, pass_fds: tuple[int, ...] = ()) -> Client:
        return self.begin(language, pass_fds=pass_fds).ready()

    def mapped(self, region: Region, language: str = "c", pages: int = 4) -> Client:
        """A program that maps the region."""
        client = self.start(language)
        assert client.map(region.path, pages) == 0
        return client

    def fork(self, client: Client) -> Client:
        self.clients.append(client.fork(self.place))
        return self.clients[-1]

    def listed(self, region: Region) -> list[list[str]]:
        """The fields of the lines of the region's ``clients`` file."""
        name = Path(region.path).name
        text = (self.served.path / ".control" / name / "clients").read_text()
        return [line.split(" ") for line in text.splitlines()]

    def states(self, region: Region) -> dict[int, str]:
        """How each process stands to the table, without the reason."""
        return {int(line[0]): line[4].split(":")[0] for line in self.listed(region)}

    def untraced(self) -> None:
        """Until nobody is traced any more: who has opened and not mapped is let go by and by."""
        for client in self.clients:
            if client.alive:
                until(lambda: not tracers(client.pid), f"{client.pid} not to be traced")  # noqa: B023

    def close(self) -> None:
        """End the programs, remove the regions; the server then holds what it held before."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        for region in self.regions:
            region.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(region.path)
        self.regions.clear()


@pytest.fixture
def gate() -> str:
    """The gate that is tested; the mounts of ``start_mount`` have it by themselves."""
    return GATE or "ptrace"


@pytest.fixture(params=["vma", "fault"])
def way(request) -> str:
    """How mounts protect. What ``auto`` chooses is one of the two; see test_ways.py."""
    return request.param


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """Build a program, once."""
    place = tmp_path_factory.mktemp("programs")
    found: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in found:
            found[name] = build(name, place)
        return found[name]

    return get


@pytest.fixture(scope="module")
def mounts(tmp_path_factory) -> Iterator[Callable[[str], Served]]:
    """Mounts by their options, each started once for all tests of a module."""
    started: dict[str, Served] = {}
    with serving(tmp_path_factory.mktemp("mounts")) as start:

        def get(options: str) -> Served:
            if options not in started or started[options].process.poll() is not None:
                started[options] = start(options)
            return started[options]

        yield get


@pytest.fixture
def share_with(mounts, tmp_path, built, gate) -> Iterator[Callable[..., Share]]:
    """Use a mount that protects in one way, with more options."""
    shares: list[Share] = []

    def start(way: str, options: str = "") -> Share:
        text = f"gate={gate},protect={way}" + (f",{options}" if options else "")
        shares.append(Share(mounts(text), way, tmp_path, built))
        return shares[-1]

    yield start
    try:
        for share in shares:
            share.untraced()
    finally:
        for share in shares:
            share.close()
    for share in shares:
        assert "Traceback" not in share.served.log.read_text(), share.served.log.read_text()
        share.let_go()


@pytest.fixture
def share(share_with, way) -> Share:
    return share_with(way)
