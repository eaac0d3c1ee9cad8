"""The errno of every rule in docs/ioctl.md, asserted by a C program with the installed header."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "msharefs" / "include"


def test_each_rule_has_its_errno(mount, tmp_path):
    program = tmp_path / "rules"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    subprocess.run(["cc", *flags, "-o", str(program), str(HERE / "rules.c")], check=True)
    done = subprocess.run(
        [str(program), str(mount.path)], capture_output=True, text=True, check=False, timeout=120
    )
    failed = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert not failed, "\n".join(failed)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 90
