"""The manual pages: their generated parts are what the commands say, and they are well-formed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from msharefs.cli.exits import EXIT_CODES
from msharefs.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "man").glob("*.[1-9]"))


@pytest.fixture(scope="module")
def gen_man():
    loader = SourceFileLoader("gen_man", str(ROOT / "scripts" / "gen-man"))
    spec = importlib.util.spec_from_loader("gen_man", loader)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_three_pages_are_there():
    assert [page.name for page in PAGES] == ["mshare.1", "msharefs.2", "msharefs.8"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_in_sync(gen_man, page):
    text = page.read_text()
    assert gen_man.PART.search(text), "it has generated parts"
    assert gen_man.generated(text) == text, "run scripts/gen-man"


def test_check_says_which_page_is_stale(gen_man, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "mshare.1"
    monkeypatch.setattr(gen_man, "PAGES", tmp_path)
    monkeypatch.setattr(gen_man, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gen-man", "--check"])
    stale.write_text(re.sub(r"(?<=begin exit_status\n)", ".Pp\n", PAGES[0].read_text()))
    with pytest.raises(SystemExit, match=r"mshare\.1: out of date"):
        gen_man.main()
    monkeypatch.setattr(sys, "argv", ["gen-man"])
    gen_man.main()
    assert stale.read_text() == PAGES[0].read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_no_complaints(page):
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is missing")
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0


def test_every_command_and_exit_status_is_in_the_page():
    page = PAGES[0].read_text()
    for name in COMMANDS:
        assert f".Ss {name} " in page
    for code in EXIT_CODES:
        assert f".It {int(code)}\n" in page
