"""The errno of every rule in docs/ioctl.md, asserted by a C program with the installed header.

Once as a program of 64 bits, once of 32: those come through the kernel's compat entry, with a
number of their own for CREATE_MAPPING.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "msharefs" / "include"
FLAGS = ["-D_FILE_OFFSET_BITS=64", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]


@pytest.fixture(params=["-m64", "-m32"])
def outcome(start_mount, tmp_path, request):
    """What the program ended with: its lines are ``ok``, ``FAIL`` or ``skip``."""
    program = tmp_path / "rules"
    command = ["cc", request.param, "-o", str(program), "-x", "c"]
    trial = subprocess.run(
        [*command, "-"], input="int main(void) { return 0; }", text=True, check=False
    )
    if trial.returncode:
        pytest.skip(f"cc {request.param} does not work: gcc-multilib is missing")
    subprocess.run([*command, *FLAGS, str(HERE / "rules.c")], check=True)
    return subprocess.run(
        [str(program), str(start_mount().path), str(start_mount().path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_each_rule_has_its_errno(outcome):
    lines = outcome.stdout.splitlines()
    failed = [line for line in lines if not line.startswith(("ok ", "skip "))]
    assert not failed, "\n".join(failed)
    assert outcome.returncode == 0, outcome.stderr
    assert len(lines) > 150


def test_no_rule_was_left_out(outcome):
    skipped = [line for line in outcome.stdout.splitlines() if line.startswith("skip ")]
    if skipped:
        pytest.skip("; ".join(line.removeprefix("skip ") for line in skipped))
