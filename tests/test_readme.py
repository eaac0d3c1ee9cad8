"""Every command and every example in the README runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python|c)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INDENTED = re.findall(r"(?:^    .+\n)+", README, re.MULTILINE)
MOUNTS = Path("/proc/self/mountinfo")
INCLUDE = ROOT / "msharefs" / "include"
HERE = Path(sys.executable).parent
"""Where ``mshare`` and ``msharefs`` are installed."""


@pytest.fixture
def place(tmp_path):
    """A directory that examples mount on in the place of /run/mshare."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing")
    yield tmp_path / "mshare"
    subprocess.run(["umount", "-l", tmp_path / "mshare"], check=False, capture_output=True)


def run(script):
    """The outcome of some lines of shell, the first that fails being the last."""
    return subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *script])],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{HERE}:{os.environ['PATH']}"},
    )


def test_the_tour_runs_from_top_to_bottom(tmp_path, place):
    assert [kind for kind, _ in BLOCKS] == ["sh", "python", "c", "sh"]
    script = []
    for number, (kind, text) in enumerate(BLOCKS):
        here = text.replace("/run/mshare", str(place))
        # A bare name is a region of the only mount; there may be others, of other tests, so it
        # is taken from the one that the working directory is on.
        here = here.replace("--background\n", f"--background\ncd {place}\n")
        here = here.replace("mshare umount", "cd /\nmshare umount")
        program = tmp_path / f"example{number}.{kind}"
        program.write_text(here)
        if kind == "python":
            script.append(f"{sys.executable} {program}")
        elif kind == "c":
            script.append(f"cc -Wall -Wextra -Werror -I {INCLUDE} -o {program}.out {program}")
            script.append(f"{program}.out")
        else:
            script.append(here)
    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello" in done.stdout, "read(2) sees what write(2) wrote"
    assert "b'hello'" in done.stdout, "and so does the mapping"
    assert "hello!" in done.stdout, "and the C program's, with what it has added"
    assert "rw-" in done.stdout
    file = Path("/etc/os-release").read_text()
    assert file in done.stdout, "read(2) of the region reads the file that lies in it"
    assert repr(file[:11].encode()) in done.stdout, "and so does a mapping"
    assert str(place) not in MOUNTS.read_text()


def test_mount_8_finds_the_server_where_the_readme_links_it(place):
    (block,) = (text for text in INDENTED if "mount -t fuse.msharefs" in text)
    linked = Path("/usr/local/bin/msharefs")
    assert f" {linked.parent}/\n" in block
    place.mkdir()
    script = [line.strip() for line in block.splitlines()]
    script = [line.replace("$PWD/.venv/bin", str(HERE)) for line in script]
    script = [line.replace("/run/mshare", str(place)) for line in script]
    directory = os.open(linked.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # other runs of this test on this machine
        if os.path.lexists(linked):
            pytest.skip(f"{linked} is there already, and not ours to replace")
        try:
            done = run([*script, f"stat -f -c '%b %S' {place}", f"umount {place}"])
        finally:
            linked.unlink(missing_ok=True)
    finally:
        os.close(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    blocks, size = map(int, done.stdout.split())
    assert blocks * size == 4 << 30, "size=4G has reached the server"
    assert str(place) not in MOUNTS.read_text()


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test"])
def test_the_two_commands_are_there_and_teach(script):
    assert f"\n    {script} " in README
    done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage:")


def processes_with(variable):
    """The processes that were started with an environment that says so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if variable.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


def test_the_demo_does_the_main_job(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [ROOT / "scripts" / "demo"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all checksums agree; unmounted, nothing left behind\n")
    assert list(scratch.iterdir()) == []
    assert str(scratch) not in MOUNTS.read_text()
    deadline = time.monotonic() + 30  # a server that was told to end may be about to
    while (left := processes_with(f"TMPDIR={scratch}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
