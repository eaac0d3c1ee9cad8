"""File objects from the command line: mapped, listed, synced, and how each of these is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from msharefs.client import Region, parse_maps
from tests.objects.conftest import loop_device, mounted, run

PAGE = 4096
COMMAND = [sys.executable, "-m", "msharefs.cli.main"]


@pytest.fixture
def mshare(mount):
    """Run a command on this test's mount, written ``@``: what it says, having ended with status."""

    def run(*arguments, status=0):
        words = [str(word).replace("@", f"{mount.path}/") for word in arguments]
        done = subprocess.run(
            [*COMMAND, *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert len(done.stderr.splitlines()) == bool(status), done.stderr
        return done.stderr if status else done.stdout

    return run


@pytest.fixture
def pool(mount):
    """A region of a megabyte."""
    with Region.create(mount.path / "pool", 1 << 20):
        pass
    return mount.path / "pool"


def listed(mshare, *arguments):
    return json.loads(mshare("objects", *arguments, "--json"))["objects"]


@pytest.fixture
def table(tmp_path):
    """A file of two pages and a bit."""
    path = tmp_path / "table"
    path.write_bytes(os.urandom(2 * PAGE + 100))
    return path


def test_a_file_in_a_region_is_the_file_itself(mshare, pool, table):
    mshare("map", "@pool", table, "--offset", "64K", "--prot", "rw-")
    (found,) = listed(mshare, "@pool")
    status = table.stat()
    assert found == {
        "region": "pool",
        "start": 65536,
        "size": 3 * PAGE,
        "prot": "rw-",
        "objoffset": 0,
        "maj:min": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        "inode": status.st_ino,
        "kind": "file",
        "path": str(table),
    }
    fd = os.open(pool, os.O_RDWR)
    try:
        assert os.pread(fd, PAGE, 65536) == table.read_bytes()[:PAGE]
        os.pwrite(fd, b"by way of the region", 65536)
    finally:
        os.close(fd)
    assert table.read_bytes().startswith(b"by way of the region")
    assert mshare("sync", "@pool") == ""
    assert mshare("sync", "@pool", "--offset", "64K", "--length", "4K") == ""


def test_a_part_of_a_file(mshare, pool, table):
    part = ("--object-offset", "4K", "--length", "4K")
    mshare("map", "@pool", table, "--offset", "0", "--prot", "r--", *part)
    (found,) = listed(mshare, "@pool")
    assert (found["objoffset"], found["size"], found["prot"]) == (PAGE, PAGE, "r--")
    with pool.open("rb") as file:
        assert file.read(PAGE) == table.read_bytes()[PAGE : 2 * PAGE]


def test_a_file_is_opened_with_no_more_access_than_it_needs(mshare, pool, tmp_path):
    program = tmp_path / "program"
    shutil.copy(shutil.which("cat"), program)
    running = subprocess.Popen([program], stdin=subprocess.PIPE)
    try:
        where = ("--offset", "0", "--length", "4K")
        message = mshare("map", "@pool", program, *where, "--prot", "rw-", status=1)
        assert f"{program}: ETXTBSY: it is a program that runs" in message
        mshare("map", "@pool", program, *where, "--prot", "r-x")
        change = ("protect", "@pool", *where, "--prot", "rw-")
        assert "EACCES" in mshare(*change, status=5)
    finally:
        running.communicate()
    assert [row["prot"] for row in listed(mshare, "@pool")] == ["r-x"]


def test_what_cannot_be_mapped_is_said_in_a_line_that_helps(mshare, mount, pool, table, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def refused(*arguments, status=1, prot="r--", offset="0"):
        words = ("map", "@pool", *arguments, "--offset", offset, "--prot", prot)
        return mshare(*words, status=status)

    assert f"{tmp_path}/none: ENOENT: No such file" in refused(tmp_path / "none", status=3)
    assert "the object is a pipe, not a regular file" in refused(pipe)
    assert "the object is a directory, not a regular file" in refused(tmp_path)
    assert "EISDIR: it is a directory" in refused(tmp_path, prot="rw-")
    assert "character device" in refused("/dev/null", prot="rw-")
    assert "regions do not nest" in refused(pool, prot="rw-")
    assert "has 8292 bytes: nothing is left at 16384" in refused(table, "--object-offset", "16K")
    assert "not a multiple of 4096" in refused(table, "--object-offset", "1")
    assert "12288 bytes do not fit at 1040384 of 1048576" in refused(table, offset="1016K")
    assert "reaches past the region's end" in refused(table, "--length", "8K", offset="1020K")
    table.write_bytes(b"")
    assert "has 0 bytes: there is nothing to map" in refused(table)
    assert listed(mshare, "@pool") == []
    mshare("objects", "@none", status=3)
    mshare("objects", "/nowhere", status=3)
    mshare("sync", "@none", status=3)
    assert "not a multiple of 4096" in mshare("sync", "@pool", "--offset", "1", status=1)
    mshare("sync", "@pool", "--offset", "2M", status=1)
    mshare("sync", mount.path, status=2)


def test_a_mount_without_a_gate_says_what_to_do(start_mount, table):
    place = start_mount("gate=none").path
    Region.create(place / "r", PAGE * 4).close()
    command = [*COMMAND, "map", place / "r", table, "--offset", "0", "--prot", "r--"]
    for words in (command, [*COMMAND, "sync", place / "r"]):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "EOPNOTSUPP" in done.stderr
        assert "-o gate=none" in done.stderr


def test_the_objects_of_a_mount_and_of_a_directory(mshare, mount, pool, table):
    (mount.path / "dir").mkdir()
    Region.create(mount.path / "dir/inner", 1 << 20).close()
    Region.create(mount.path / "memory", 1 << 20).close()
    mshare("map", "@memory", "--anon", "--offset", "0", "--prot", "rw-")
    for region, offset in (("@pool", "0"), ("@dir/inner", "0"), ("@pool", "512K")):
        mshare("map", region, table, "--offset", offset, "--prot", "r--")
    found = [(row["region"], row["start"]) for row in listed(mshare, mount.path)]
    assert found == [("dir/inner", 0), ("pool", 0), ("pool", 524288)]
    assert [row["region"] for row in listed(mshare, "@dir")] == ["dir/inner"]
    assert listed(mshare, "@memory") == []
    header, line = mshare("objects", "@dir").splitlines()
    assert header.split() == [
        *("REGION", "START", "SIZE", "PROT", "OBJOFFSET", "MAJ:MIN", "INODE", "KIND", "PATH")
    ]
    assert line.split()[-2:] == ["file", str(table)]


def test_names_are_as_they_are_now_and_one_to_a_line(mshare, pool, tmp_path):
    odd = tmp_path / os.fsdecode(b"a b\nc\\\xff\r\x1c")
    for name in ("renamed", "deleted", odd):
        (tmp_path / name).write_bytes(b"x" * PAGE)
    memory = os.memfd_create("mine")
    os.write(memory, b"m" * PAGE)
    with Region.open(pool) as region:
        region.map(0, PAGE, "r--", object=tmp_path / "renamed")
        region.map(PAGE, PAGE, "r--", object=tmp_path / "deleted")
        region.map(2 * PAGE, PAGE, "r--", object=odd)
        region.map(3 * PAGE, PAGE, "rw-", fd=memory)
        region.map(4 * PAGE, PAGE, "rw-")
        queried = list(region)
    os.close(memory)
    (tmp_path / "renamed").rename(tmp_path / "other")
    (tmp_path / "deleted").unlink()
    paths = [f"{tmp_path}/other", f"{tmp_path}/deleted (deleted)", str(odd)]
    paths.append("/memfd:mine (deleted)")
    found = listed(mshare, "@pool")
    assert [row["path"] for row in found] == paths
    assert [row["kind"] for row in found] == ["file", "file", "file", "shmem"]
    maps = (pool.parent / ".control/pool/maps").read_bytes()
    assert maps.count(b"\n") == 5
    assert maps.splitlines()[-1].endswith(b" 00:00 0 anon")
    parsed = parse_maps(os.fsdecode(maps))
    assert parsed == queried, "what a query tells is the same"
    assert [m.object_path for m in parsed] == [*paths, None]
    assert [m.object_shmem for m in parsed] == [False, False, False, True, None]
    nameless = ("@none\n\x1b", "--offset", "0", "--prot", "r--")
    assert mshare("map", "@pool", *nameless, status=3).endswith(
        "none\\n\\x1b: ENOENT: No such file or directory\n"
    )
    lines = mshare("watch", "@pool", "--history", "--timeout", "0").splitlines()
    assert sum(" map " in line for line in lines) == len(queried)
    rows = json.loads(mshare("query", "@pool", "--json"))["mappings"]
    assert [(row["kind"], row["path"]) for row in rows[3:]] == [("shmem", paths[3]), ("anon", None)]
    assert len(mshare("objects", "@pool").splitlines()) == 5


@pytest.fixture
def public(start_mount):
    """A mount that everybody can reach."""
    with tempfile.TemporaryDirectory(prefix="msharefs-test.", dir="/run") as place:
        Path(place).chmod(0o755)
        served = start_mount(place=Path(place, "mnt"))
        yield served
        served.stop()


def test_regions_that_are_closed_to_one_are_left_out(public, table):
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        with Region.create(public.path / name, PAGE * 4, mode) as region:
            region.map(0, PAGE, "r--", object=table)
    code = (
        "import os, sys\n"
        "from click.testing import CliRunner\n"
        "from msharefs.cli.main import main, mshare\n"
        "CliRunner().invoke(mshare, sys.argv[1:])  # imports what only root may read\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "main(sys.argv[1:])\n"
    )
    words = ["-o", "REGION,PATH", "--noheadings"]

    def asked(place):
        command = [sys.executable, "-c", code, "objects", str(place), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = asked(public.path)
    assert (done.returncode, done.stdout) == (0, f"open {table}\n"), done.stderr
    assert asked(public.path / "closed").returncode == 5


@pytest.fixture
def full_disk(tmp_path):
    """A filesystem whose device has less room than it believes: its writes fail when synced."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is missing")
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "none") as small:
        image = small / "image"
        with image.open("wb") as file:
            file.truncate(64 << 20)
        run("mkfs.ext4", "-q", "-O", "^has_journal", image)
        with loop_device(image) as device, mounted(tmp_path / "full", device) as full:
            yield full


def test_sync_ends_with_the_error_of_the_storage(full_disk, start_mount):
    mount = start_mount()
    victim = full_disk / "victim"
    with victim.open("wb") as file:
        file.truncate(8 << 20)
    with Region.create(mount.path / "r", 8 << 20) as region:
        region.map(0, 8 << 20, "rw-", object=victim)
    with open(mount.path / "r", "r+b", buffering=0) as file:
        while file.tell() < 8 << 20:
            file.write(os.urandom(1 << 20))
    done = subprocess.run(
        [*COMMAND, "sync", mount.path / "r"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "sync r: ENOSPC: fsync of " in done.stderr or "sync r: EIO: fsync of " in done.stderr
    assert str(victim) in done.stderr
    with Region.open(mount.path / "r") as region:
        region.unmap(0, 8 << 20)
    mount.stop()


CLIENT = """
import mmap, os, resource, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 0)
{}
print(memory[:3], flush=True)
sys.stdin.read()
print(memory[:3], flush=True)
"""
ELSEWHERE = "os.chroot('/usr')"
FULL = """
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
try:
    while True:
        os.dup(0)
except OSError:
    pass
"""


@pytest.mark.parametrize(
    ("hindrance", "status", "words"),
    [
        (ELSEWHERE, 5, "EPERM: process {} does not see the mount: another root or mount namespace"),
        (FULL, 1, "EMFILE: a process that maps the region has no descriptor free"),
    ],
    ids=["another root", "no descriptor free"],
)
def test_a_client_that_cannot_be_shown_a_file(mshare, pool, table, hindrance, status, words):
    mshare("map", "@pool", "--anon", "--offset", "0", "--prot", "rw-")
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT.format(hindrance), pool],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout.readline() == "b'\\x00\\x00\\x00'\n"
        message = mshare("map", "@pool", table, "--offset", "0", "--prot", "r--", status=status)
        assert words.format(client.pid) in message
        assert listed(mshare, "@pool") == []
        out, _ = client.communicate(timeout=60)
        assert out == "b'\\x00\\x00\\x00'\n", "the memory is where it was"
        assert client.returncode == 0
    finally:
        client.kill()
        client.communicate()
    mshare("map", "@pool", table, "--offset", "0", "--prot", "r--")
    assert len(listed(mshare, "@pool")) == 1


def test_who_maps_the_region_sees_the_file(mshare, pool, table):
    """One that maps it already, and one that comes later."""
    mshare("map", "@pool", "--anon", "--offset", "0", "--prot", "rw-")
    code = CLIENT.format("")
    words = [sys.executable, "-c", code, pool]
    client = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout.readline() == "b'\\x00\\x00\\x00'\n"
        mshare("map", "@pool", table, "--offset", "0", "--prot", "rw-")
        begin = repr(table.read_bytes()[:3]) + "\n"
        assert client.communicate(timeout=60)[0] == begin
        later = subprocess.run(words, input="", capture_output=True, text=True, check=True)
        assert later.stdout == begin * 2
    finally:
        client.kill()
        client.communicate()
