"""Every command and every example in the README runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_tour_runs_from_top_to_bottom(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing")
    place = tmp_path / "mshare"
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    script = ["set -e"]
    for number, (kind, text) in enumerate(BLOCKS):
        here = text.replace("/run/mshare", str(place))
        # A bare name is a region of the only mount; there may be others, of other tests, so it
        # is taken from the one that the working directory is on.
        here = here.replace("--background\n", f"--background\ncd {place}\n")
        here = here.replace("mshare umount", "cd /\nmshare umount")
        if kind == "python":
            program = tmp_path / f"example{number}.py"
            program.write_text(here)
            script.append(f"{sys.executable} {program}")
        else:
            script.append(here)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "hello" in done.stdout, "read(2) sees what write(2) wrote"
        assert "b'hello'" in done.stdout, "and so does the mapping"
        assert "rw-" in done.stdout
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test"])
def test_the_two_commands_are_there_and_teach(script):
    assert f"\n    {script} " in README
    done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")


def test_the_demo_does_the_main_job():
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        [ROOT / "scripts" / "demo"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all checksums agree; unmounted, nothing left behind\n")
    assert str(ROOT) not in Path("/proc/self/mountinfo").read_text()
