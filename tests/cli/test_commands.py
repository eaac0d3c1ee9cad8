"""The commands on a real mount: what they print, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msharefs.cli.main import COMMANDS


@pytest.fixture
def mshare(mount):
    """Run a command; its FILE arguments are relative to the mount of this test."""

    def run(*arguments, status=0):
        words = [
            word.replace("@", f"{mount.path}/") if word.startswith("@") else word
            for word in arguments
        ]
        command = [sys.executable, "-m", "msharefs.cli.main", *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if status:
            assert len(done.stderr.strip().splitlines()) <= 1, "an error is one line"
        return done.stdout if not status else done.stdout + done.stderr

    return run


def test_a_region_through_its_life(mshare, mount):
    mshare("create", "@pool", "--size", "64M", "--mode", "640")
    assert (mount.path / "pool").stat().st_mode & 0o777 == 0o640
    assert (mount.path / "pool").stat().st_size == 64 << 20
    mshare("map", "@pool", "--anon", "--offset", "0", "--length", "1M", "--prot", "rw-")
    mshare("protect", "@pool", "--offset", "0x10000", "--length", "64K", "--prot", "r--")
    listed = json.loads(mshare("query", "@pool", "--json"))["mappings"]
    assert [row["prot"] for row in listed] == ["rw-", "r--", "rw-"]
    assert (
        mshare("query", "@pool", "--offset", "64K", "--noheadings", "-o", "PROT").strip() == "r--"
    )
    assert "1M" in mshare("ls", str(mount.path))
    regions = json.loads(mshare("ls", str(mount.path), "--json"))["regions"]
    assert regions[0]["name"] == "pool"
    assert regions[0]["size"] == 64 << 20
    mshare("unmap", "@pool", "--offset", "0", "--length", "1M")
    assert "nothing is mapped" in mshare("query", "@pool", "--offset", "0", status=4)
    mshare("resize", "@pool", "1M")
    assert (mount.path / "pool").stat().st_size == 1 << 20
    mshare("rm", "@pool")
    assert not (mount.path / "pool").exists()


def test_info_says_what_a_region_and_a_mount_are(mshare, mount):
    mshare("create", "@r", "--size", "1M")
    assert json.loads(mshare("info", "@r", "--json"))["size"] == 1 << 20
    found = json.loads(mshare("info", str(mount.path), "--json"))
    assert found["alignment"] == 4096
    known = ["protect", "query", "events", "enforce", "notify", "file_objects"]
    assert found["features"] == known


def test_what_a_name_does_to_a_terminal(mshare, mount):
    name = "a\nb\x1b[31m"
    mshare("create", f"@{name}", "--size", "4K")
    shown = [
        mshare("info", f"@{name}"),
        mshare("ls", str(mount.path)),
        mshare("watch", f"@{name}", "--history", "--timeout", "0"),
        mshare("rm", f"@{name}.", status=3),
    ]
    for text in shown:
        assert r"a\nb\x1b[31m" in text
        assert "\x1b" not in text


def test_regions_that_no_path_reaches_are_not_in_the_way(mshare, mount):
    mshare("create", "@r", "--size", "4K")
    parents = [os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)]
    for _ in range(17):
        os.mkdir("d" * 255, dir_fd=parents[-1])
        parents.append(os.open("d" * 255, os.O_RDONLY, dir_fd=parents[-1]))
        os.close(os.open("r", os.O_RDWR | os.O_CREAT, dir_fd=parents[-1]))
    listed = json.loads(mshare("ls", str(mount.path), "--json"))["regions"]
    assert 10 < len(listed) < 17
    assert "r" in {row["name"] for row in listed}
    assert json.loads(mshare("info", str(mount.path), "--json"))["regions"] == len(listed)
    mshare("objects", str(mount.path))
    for parent in parents:
        os.close(parent)


def test_ioctl_sends_any_command_field_by_field(mshare):
    mshare("create", "@r", "--size", "1M")
    flags = "flags=MAP_SHARED|MAP_FIXED|MAP_ANONYMOUS"
    mshare("ioctl", "@r", "map", "size=64K", "prot=rw-", flags)
    answer = json.loads(mshare("ioctl", "@r", "query", "query_flags=next", "--json"))
    assert (answer["start"], answer["size"], answer["prot"]) == (0, 65536, 3)
    message = mshare("ioctl", "@r", "protect", "size=1M", "prot=r--", status=4)
    assert "ENOMEM" in message
    assert mshare("ioctl", "@r", "sync", "size=4K") == ""
    assert "EINVAL" in mshare("ioctl", "@r", "sync", "size=4K", "flags=1", status=1)
    mshare("ioctl", "@r", "map", "bogus=1", status=2)
    mshare("ioctl", "@r", "map", "prot=zz", status=2)


def test_a_region_of_any_size_is_mapped_to_the_end_of_its_last_page(mshare):
    mshare("create", "@odd", "--size", "9000")
    mshare("map", "@odd", "--anon", "--offset", "4K", "--prot", "r--")
    (found,) = json.loads(mshare("query", "@odd", "--json"))["mappings"]
    assert (found["start"], found["size"]) == (4096, 8192)


def test_watch_follows_events(mshare, mount):
    mshare("create", "@r", "--size", "1M")
    lines = mshare("watch", "@r", "--json", "--history", "--count", "2").splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["open", "resize"]
    assert "resize" in mshare("watch", "@r", "--history", "--timeout", "0")
    mshare("watch", "@r", "--count", "1", "--timeout", "0", status=4)
    watcher = subprocess.Popen(
        [sys.executable, "-m", "msharefs.cli.main", "watch", str(mount.path), "--count", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        # It has begun to watch once it has read what was there: its descriptor is open then.
        while not _has_open(watcher.pid, f"{mount.path}/.control/events"):
            assert watcher.poll() is None
            assert time.monotonic() < deadline
        while watcher.poll() is None:
            assert time.monotonic() < deadline
            with (mount.path / "other").open("wb"):
                pass
            try:
                watcher.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert "other open" in watcher.stdout.read()
    finally:
        watcher.kill()
        watcher.communicate()


def _has_open(pid, path):
    try:
        links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return path in links


def test_a_process_with_an_odd_name_is_one_line(mshare, mount):
    name = b"a b\n1 \\\r\x1c\xff"
    mshare("create", "@r", "--size", "4K")
    code = (
        "import mmap, sys\n"
        f"open('/proc/self/comm', 'wb').write({name})\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "memory = mmap.mmap(file.fileno(), 0)\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.read()\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", code, mount.path / "r"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout.readline() == "mapped\n"
        (found,) = json.loads(mshare("clients", "@r", "--json"))["clients"]
        assert (found["pid"], found["comm"]) == (client.pid, os.fsdecode(name))
        assert len(mshare("clients", "@r").splitlines()) == 2
        assert (mount.path / ".control/r/clients").read_bytes().count(b"\n") == 1
    finally:
        client.communicate()


def test_errors_are_one_line_and_have_their_status(mshare, mount):
    assert "no such region" in mshare("query", "@nope", status=3)
    mshare("create", "@r", "--size", "1M")
    mshare("create", "@r", "--size", "1M", status=6)
    mshare("create", "@s", "--size", "zebra", status=2)
    mshare("rm", "@mshare_info", status=5)
    wrong = ("map", "@r", "--anon", "--offset", "1", "--length", "4K", "--prot", "rw-")
    assert "not a multiple of 4096" in mshare(*wrong, status=1)
    hole = ("protect", "@r", "--offset", "0", "--length", "4K", "--prot", "r--")
    mshare(*hole, status=4)
    mshare("mount", str(mount.path), status=6)
    mshare("mount", f"{mount.path}-missing", status=3)
    mshare("mount", "/tmp", "-o", "bogus", status=2)
    mshare("umount", "/nowhere", status=3)


def test_check_reports_every_probe(mshare):
    checks = {row["name"]: row for row in json.loads(mshare("check", "--json"))["checks"]}
    assert checks["fuse-passthrough"]["ok"]
    assert all(row["ok"] or row["mend"] for row in checks.values())


def test_every_command_teaches(mshare):
    for name in COMMANDS:
        text = mshare(name, "--help")
        assert "Example" in text, name


def test_background_mount_and_umount(mshare, tmp_path):
    place = tmp_path / "second"
    place.mkdir()
    try:
        assert "served by process" in mshare("mount", str(place), "--background", "-o", "size=1M")
        assert (place / "mshare_info").read_text() == "4096\n"
    finally:
        mshare("umount", str(place))
    assert not (place / "mshare_info").exists()


def test_completion_scripts(mshare):
    for shell in ("bash", "zsh", "fish"):
        assert "MSHARE_COMPLETE" in mshare("completion", shell)
