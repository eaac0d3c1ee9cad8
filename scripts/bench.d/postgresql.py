"""PostgreSQL with its dynamic shared memory on an automap mount, against the same on /dev/shm.

One cluster takes turns: it is restarted with ``pg_dynshmem`` on tmpfs, and on mounts with the
options that docs/automap.md advises (``io=native,private=allow``), with huge pages beside them, and
with none. (Clusters side by side differ by more than that, through where their memory happens to
lie.) PostgreSQL fills its shared memory by write(), and opens it in each worker, so the mounts
differ in what a new piece of it costs.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
from mounts import BenchError, msharefs_mount
from samples import Spread

from tests.programs.postgres import USER, Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS: Final = {
    "select": "pgbench -S",
    "parallel": "parallel hash join",
    "count": "parallel count",
}
OPTIONS: Final = {
    "native": "automap,io=native,private=allow",
    "huge": "automap,io=native,private=allow,huge=within_size",
    "checked": "automap",
}
MOUNTS: Final = tuple(OPTIONS)
SIDES: Final = (*MOUNTS, "tmpfs")
PARALLEL: Final = (
    "select count(*), sum(a.abalance + b.bid)"
    " from pgbench_accounts a join pgbench_accounts b using (aid);\n"
)
COUNT: Final = "select count(*) from pgbench_accounts;\n"
CLIENTS: Final = 2


@attrs.frozen
class QueryRow:
    """Spreads of queries a second by side; ``ratios`` are a mount's over tmpfs', round by round."""

    kind: str
    rates: dict[str, Spread]
    ratios: dict[str, Spread]

    def as_json(self) -> dict[str, Any]:
        rates = {side: spread.as_json() for side, spread in self.rates.items()}
        ratios = {side: round(spread.p50, 3) for side, spread in self.ratios.items()}
        rounds = self.rates["tmpfs"].count
        return {"kind": self.kind, "rates": rates, "ratio": ratios, "rounds": rounds}


def measure(
    scratch: Path, scale: int, rounds: int, seconds: int, advance: Callable[[int], None]
) -> list[QueryRow]:
    """``rounds`` of ``seconds`` for each side, on ``scale`` times 100,000 rows."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack:
        place = stack.enter_context(_reachable(scratch))
        shm = tempfile.TemporaryDirectory(prefix="msharefs-bench.", dir="/dev/shm")
        dynamic = {"tmpfs": Path(stack.enter_context(shm))}
        dynamic["tmpfs"].chmod(0o711)
        for side, options in OPTIONS.items():
            mount = msharefs_mount(place / side, options)
            dynamic[side] = stack.enter_context(mount).directory
        cluster = stack.enter_context(_cluster(place / "data", dynamic, scale))
        for number in range(rounds):
            turn = number % len(SIDES)
            rates: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
            for side in SIDES[turn:] + SIDES[:turn]:
                _move(cluster, dynamic[side])
                for kind, found_there in rates.items():
                    found_there[side] = _rate(cluster, kind, seconds)
            for kind, results in found.items():
                results.append(rates[kind])
                advance(1)
    return [_row(kind, results) for kind, results in found.items()]


def _row(kind: str, results: list[dict[str, float]]) -> QueryRow:
    rates = {side: Spread.of(result[side] for result in results) for side in SIDES}
    ratios = {
        side: Spread.of(result[side] / result["tmpfs"] for result in results) for side in MOUNTS
    }
    return QueryRow(kind, rates, ratios)


def _rate(cluster: Cluster, kind: str, seconds: int) -> float:
    """Queries a second."""
    words = ["-n", "-T", str(seconds)]
    if kind == "select":
        words += ["-S", "-c", str(CLIENTS), "-j", str(CLIENTS)]
    else:
        script = cluster.data / f"{kind}.sql"
        script.write_text(PARALLEL if kind == "parallel" else COUNT)
        script.chmod(0o644)
        words += ["-f", str(script)]
    output = cluster.pgbench(*words)
    rate = re.search(r"^tps = ([0-9.]+)", output, re.MULTILINE)
    if rate is None:
        raise BenchError(f"pgbench said no rate:\n{output}")
    return float(rate[1])


@contextmanager
def _cluster(data: Path, dynamic: dict[str, Path], scale: int) -> Iterator[Cluster]:
    cluster = Cluster(data, _tool)
    try:
        cluster.make(shared_buffers="256MB")
        for place in dynamic.values():
            cluster.move_dynamic_memory(place / "dynshmem")
        cluster.start()
        cluster.pgbench("-i", "-q", "-s", str(scale))
        yield cluster
    except AssertionError as error:
        raise BenchError(str(error)) from None
    finally:
        cluster.stop()


def _move(cluster: Cluster, dynamic: Path) -> None:
    """Go on with the dynamic memory elsewhere, and everything that is asked for in memory."""
    cluster.stop()
    link = cluster.data / "pg_dynshmem"
    link.unlink()
    link.symlink_to(dynamic / "dynshmem")
    cluster.start()
    cluster.ask("select count(*), sum(abalance) from pgbench_accounts")


def _tool(name: str) -> str:
    found = shutil.which(name)
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    if found is None and not places:
        raise BenchError(f"{name} is missing (Debian package postgresql); it runs as {USER}")
    return found or str(places[0])


@contextmanager
def _reachable(scratch: Path) -> Iterator[Path]:
    """``scratch``, where another user may pass through to what is open to him."""
    places = [scratch, Path(tempfile.gettempdir())]
    modes = [place.stat().st_mode & 0o7777 for place in places]
    for place, mode in zip(places, modes, strict=True):
        place.chmod(mode | 0o011)
    try:
        yield scratch
    finally:
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode)
