"""Imports run one way: cli -> service -> {clients, memory, fuse} -> region -> abi.

Read from the source, so that imports inside functions and those for type checkers count as well:
a dependency that only the types have is a dependency of the reader.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import msharefs

PACKAGE = Path(msharefs.__file__).parent

# Each room (a module or a package directly in msharefs) and the rooms it may use besides itself.
MAY_USE = {
    "abi": set(),
    "units": set(),
    "region": {"abi"},
    "fuse": set(),
    "memory": {"region", "abi"},
    "clients": {"region", "abi"},
    "service": {"clients", "memory", "fuse", "region", "abi", "units"},
    "client": {"abi"},
    "pagetables": set(),
    "footprint": {"client", "pagetables"},
    "cli": {"service", "client", "footprint", "pagetables", "abi", "units"},
}

# What the pure rooms may use from outside: nothing that opens, waits, or asks the system.
PURE = {
    "__future__",
    "bisect",
    "collections",
    "enum",
    "functools",
    "itertools",
    "operator",
    "struct",
}
PURE |= {"typing", "attrs", "sortedcontainers"}

# Where a library's name may appear. Users' programs need neither an event loop nor libfuse, and
# only the command line knows that there is a terminal.
ONLY_IN = {
    "pyfuse3": {"fuse", "service"},
    "trio": {"fuse", "memory", "clients", "service", "cli"},
    "sortedcontainers": {"region"},
    "click": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"cli"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports, wherever the statement stands."""
    package = ("msharefs", *path.relative_to(PACKAGE).parent.parts)
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(), path.name)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from msharefs import abi" names a room only in its second half.
            if module == "msharefs":
                found += [(node.lineno, f"msharefs.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_room_has_its_rule():
    rooms = {room_of(path) for path in files()} - {"__init__"}
    assert rooms == set(MAY_USE)


@pytest.mark.parametrize("path", files(), ids=ids)
def test_imports_run_one_way(path):
    room = room_of(path)
    forbidden = MAY_USE.keys() - MAY_USE.get(room, set()) - {room}
    wrong = [
        f"{ids(path)}:{line}: {room} imports {name}"
        for line, name in imported(path)
        if name.startswith("msharefs.") and name.split(".")[1] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", files(), ids=ids)
def test_libraries_stay_in_their_rooms(path):
    room = room_of(path)
    wrong = [
        f"{ids(path)}:{line}: {room} imports {name}"
        for line, name in imported(path)
        if room not in ONLY_IN.get(name.split(".")[0], {room})
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path", [path for path in files() if room_of(path) in {"abi", "region", "pagetables"}], ids=ids
)
def test_the_core_is_pure(path):
    wrong = [
        f"{ids(path)}:{line}: imports {name}"
        for line, name in imported(path)
        if name.split(".")[0] not in PURE | {"msharefs"}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_is_seen_to_be_broken_however_it_is_broken(tmp_path, monkeypatch):
    """The reader of imports finds each form; what it cannot find cannot be forbidden."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    path = tmp_path / "region" / "table.py"
    path.parent.mkdir()
    path.write_text(
        "import os, msharefs.service.nodes as n\n"
        "from msharefs import fuse, abi\n"
        "from ..memory import store\n"
        "from .errors import Occupied\n"
        "from .. import clients\n"
        "def later():\n"
        "    if TYPE_CHECKING:\n"
        "        from msharefs.cli.main import main\n"
    )
    assert room_of(path) == "region"
    assert imported(path) == [
        (1, "os"),
        (1, "msharefs.service.nodes"),
        (2, "msharefs.fuse"),
        (2, "msharefs.abi"),
        (3, "msharefs.memory"),
        (4, "msharefs.region.errors"),
        (5, "msharefs.clients"),
        (8, "msharefs.cli.main"),
    ]


@pytest.mark.parametrize("module", ["msharefs.abi", "msharefs.region.region", "msharefs.client"])
def test_programs_that_use_it_load_no_server(module):
    """As the interpreter sees it, with all that comes in behind the imports."""
    code = (
        f"import sys, {module};"
        "print(*sorted({name.split('.')[0] for name in sys.modules}"
        " & {'pyfuse3', 'trio', 'click', 'rich', 'psutil'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
