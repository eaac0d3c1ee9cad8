"""``mshare info``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from msharefs.abi import Feature
from msharefs.cli.command import define
from msharefs.cli.exits import failing_as
from msharefs.cli.targets import refusing_as, resolve_place
from msharefs.cli.types import complete_regions
from msharefs.units import format_size, one_line

if TYPE_CHECKING:
    from msharefs.cli.columns import Value
    from msharefs.client import Mount, RegionFile

_SIZES = frozenset(
    {"size", "mapped", "used", "alignment", "page_size", "memory_total", "memory_free"}
)


@define(
    "info",
    examples=(
        "mshare info pool",
        "mshare info /run/mshare --json",
    ),
)
@click.argument("file", metavar="FILE|DIR", shell_complete=complete_regions)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, all sizes in bytes.")
def command(file: str, as_json: bool) -> None:
    """Show what a region or a mount is."""
    mount, below = resolve_place(file)
    place = mount.region(below)
    if below and not os.path.isdir(place.path):  # noqa: PTH112 - a string is at hand
        with refusing_as("info", place):
            found = _of_region(place)
    else:
        with failing_as(f"info {file}"):
            found = _of_mount(mount)
    if as_json:
        click.echo(json.dumps(found, indent=3))
        return
    width = max(map(len, found)) + 1
    for key, value in found.items():
        label = key.replace("_", " ") + ":"
        click.echo(f"{label.ljust(width)} {_text(key, value)}")


def _of_region(region: RegionFile) -> dict[str, Any]:
    from msharefs.cli.ls import COLUMNS, Listed  # noqa: PLC0415 - only here

    row = Listed(region)
    found: dict[str, Any] = {column.key: column.get(row) for column in COLUMNS}
    return {**found, "mount": region.mount.path, "counts": _counts(row.stats) or None}


def _counts(stats: dict[str, int]) -> dict[str, int]:
    """How often what happened; the rest of the stats are shown as columns are."""
    known = {"size", "mapped", "allocated", "mappings", "descriptors"}
    return {key: value for key, value in stats.items() if key not in known}


def _of_mount(mount: Mount) -> dict[str, Any]:
    info = mount.info()
    space = os.statvfs(mount.path)
    return {
        "path": mount.path,
        "source": mount.source,
        "abi_version": info.abi_version,
        "gate": info.gate.name.lower(),
        "features": [str(bit.name).lower() for bit in Feature if bit in info.features],
        "alignment": info.alignment,
        "page_size": info.page_size,
        "regions": sum(1 for _ in mount.regions()),
        "memory_total": space.f_blocks * space.f_frsize,
        "memory_free": space.f_bavail * space.f_frsize,
    }


def _text(key: str, value: Value | list[str] | dict[str, int]) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items() if count) or "none"
    if key in _SIZES and isinstance(value, int):
        return f"{format_size(value)} ({value} bytes)" if value >= 1024 else f"{value} bytes"
    return one_line(str(value))
