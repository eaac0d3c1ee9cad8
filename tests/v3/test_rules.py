"""What a strict mount answers where nobody maps anything: sizes, ioctls, names, read and write."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys

import pytest

from msharefs.abi import Feature
from msharefs.client import Region, connect
from msharefs.service.options import MountOptions, OptionError
from tests.v3.conftest import (
    ALIGNMENT,
    ANON,
    CREATE_MAPPING,
    PAGE,
    UNMAP,
    attempt,
    create_mapping,
    fallocate,
    ioctl,
    unmap,
)

SHARED, PRIVATE, VALIDATE, FIXED, ANONYMOUS = 1, 2, 3, 0x10, 0x20
POPULATE, NOREPLACE, HUGETLB = 0x8000, 0x100000, 0x40000
HUGE = 2 << 20
PROTECT, QUERY, NOTIFY, SYNC, INFO = 0x40187810, 0xC0487811, 0x40287812, 0x40187813, 0x80407814
TCGETS = 0x5401
KEEP_SIZE = 1


def maps(strict, name="region"):
    lines = (strict.path / ".control" / name / "maps").read_text().splitlines()
    return [tuple(line.split()[:2]) for line in lines]


def test_the_alignment_is_told_by_the_file_and_by_the_ioctl(strict, fresh):
    assert (strict.path / "mshare_info").read_text() == "549755813888\n"
    assert connect(strict.path).info().alignment == ALIGNMENT
    fd = fresh(None)
    with Region(os.dup(fd), strict.path / "region") as region:
        assert region.info().alignment == ALIGNMENT
        assert not region.info().features & (Feature.PROTECT | Feature.QUERY | Feature.NOTIFY)


def test_the_root_is_everybodys_as_in_the_series(strict, mounts):
    assert stat.S_IMODE(strict.path.stat().st_mode) == 0o777
    assert stat.S_IMODE(mounts("strict=v3,mode=1700").path.stat().st_mode) == 0o1700


@pytest.mark.parametrize("size", [1, PAGE, ALIGNMENT - PAGE, ALIGNMENT + PAGE, 2 << 20])
def test_a_size_is_a_multiple_of_the_alignment(fresh, size):
    fd = fresh(None)
    assert attempt(os.ftruncate, fd, size) == "EINVAL"
    assert fallocate(fd, 0, 0, size) == "EINVAL"
    assert os.fstat(fd).st_size == 0
    assert attempt(os.ftruncate, fd, ALIGNMENT) == "", "what failed has set nothing"


@pytest.mark.parametrize("size", [ALIGNMENT, 3 * ALIGNMENT])
@pytest.mark.parametrize("way", ["ftruncate", "fallocate", "truncate"])
def test_the_size_is_set_once(strict, fresh, way, size):
    fd = fresh(None)

    def set_size(size):
        if way == "fallocate":
            return fallocate(fd, 0, 0, size)
        if way == "truncate":
            return attempt(os.truncate, strict.path / "region", size)
        return attempt(os.ftruncate, fd, size)

    assert set_size(size) == ""
    assert os.fstat(fd).st_size == size
    for again in (size, 2 * ALIGNMENT, PAGE):
        assert set_size(again) == "EINVAL"
    assert attempt(os.ftruncate, fd, 0) == "EINVAL"
    assert os.fstat(fd).st_size == size


def test_fallocate_sets_the_size_and_does_nothing_else(fresh):
    fd = fresh(None)
    assert fallocate(fd, KEEP_SIZE, 0, ALIGNMENT) == "ENOTSUP"
    assert fallocate(fd, 0, ALIGNMENT, ALIGNMENT) == "EINVAL", "an offset"
    assert fallocate(fd, 0, 0, ALIGNMENT) == ""
    assert os.fstat(fd).st_blocks == 0, "no memory"


def test_zero_is_a_size_and_stays(strict, fresh):
    fd = fresh(None)
    assert attempt(os.ftruncate, fd, 0) == ""
    assert attempt(os.ftruncate, fd, ALIGNMENT) == "EINVAL"
    assert ioctl(fd, TCGETS) == "ENOTTY", "so it is sized"
    assert create_mapping(fd, 0, PAGE) == "EINVAL"


def test_opening_with_o_trunc_sets_the_size_to_zero_or_is_refused(strict, fresh):
    path = strict.path / "region"
    fd = fresh(None)
    os.close(os.open(path, os.O_RDWR | os.O_TRUNC))
    assert attempt(os.ftruncate, fd, ALIGNMENT) == "EINVAL"
    os.unlink(path)
    fd = fresh(ALIGNMENT)
    assert attempt(os.open, path, os.O_RDWR | os.O_TRUNC) == "EINVAL"
    assert os.fstat(fd).st_size == ALIGNMENT


def test_every_ioctl_before_the_size_is_einval_and_unknown_ones_after_it_are_enotty(fresh):
    fd = fresh(None)
    commands = (CREATE_MAPPING, UNMAP, PROTECT, QUERY, NOTIFY, SYNC, 0x7899)
    for number in commands:
        assert ioctl(fd, number, bytes(128)) == "EINVAL", hex(number)
    assert ioctl(fd, TCGETS) == "EINVAL"
    assert ioctl(fd, INFO, bytes(64)) == "", "it tells what size there can be"
    os.ftruncate(fd, ALIGNMENT)
    for number in commands[2:]:
        assert ioctl(fd, number, bytes(128)) == "ENOTTY", hex(number)
    assert ioctl(fd, TCGETS) == "ENOTTY"
    assert ioctl(fd, 0x40247800, bytes(36)) == "ENOTTY", "no 32-bit programs"


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("", (0, PAGE)),
        ("", (ALIGNMENT - PAGE, PAGE)),
        ("", (0, ALIGNMENT)),
        ("", (0, 1)),  # rounded up
        ("", (PAGE, PAGE + 1)),
        ("EINVAL", (0, 0)),
        ("EINVAL", (1, PAGE)),
        ("EINVAL", (0, ALIGNMENT + 1)),
        ("EINVAL", (ALIGNMENT, PAGE)),
        ("EINVAL", (PAGE, ALIGNMENT)),
        ("EINVAL", ((1 << 64) - PAGE, PAGE)),
        ("EINVAL", (0, (1 << 64) - 1)),
        ("", (0, PAGE, 0)),
        ("", (0, PAGE, 1 | 8)),  # PROT_SEM, of which nobody knows anything
        ("EINVAL", (0, PAGE, 3, ANONYMOUS | FIXED)),
        ("EINVAL", (0, PAGE, 3, ANONYMOUS | SHARED)),
        ("EINVAL", (0, PAGE, 3, ANONYMOUS | PRIVATE | FIXED)),
        ("EINVAL", (0, PAGE, 3, ANONYMOUS | VALIDATE | FIXED)),
        ("", (0, PAGE, 3, ANON | POPULATE)),
        ("", (0, PAGE, 3, ANON | 1 << 30)),
        ("", (HUGE, HUGE, 3, ANON | HUGETLB)),
        ("EINVAL", (PAGE, HUGE, 3, ANON | HUGETLB)),
        ("EINVAL", (HUGE, 0, 3, ANON | HUGETLB)),
        ("EINVAL", (HUGE, HUGE, 3, ANON | HUGETLB | 30 << 26)),
        ("EINVAL", (0, HUGE, 3, ANON | HUGETLB | 22 << 26)),
        ("EINVAL", (ALIGNMENT, HUGE, 3, ANON | HUGETLB)),
    ],
)
def test_create_mapping_takes_its_arguments_as_mmap_does(fresh, expected, arguments):
    assert create_mapping(fresh(), *arguments) == expected


def test_create_mapping_replaces_and_rounds(strict, fresh):
    fd = fresh()
    assert create_mapping(fd, 0, 4 * PAGE, 1) == ""
    assert create_mapping(fd, PAGE, PAGE + 1, 3) == ""
    assert maps(strict) == [
        ("000000000000-000000001000", "r--s"),
        ("000000001000-000000003000", "rw-s"),
        ("000000003000-000000004000", "r--s"),
    ]
    assert create_mapping(fd, PAGE, PAGE, 3, ANON | NOREPLACE) == "EEXIST", "as mmap(2)"


@pytest.mark.parametrize(
    ("flags", "sizes", "end"),
    [
        (HUGETLB, (1, HUGE), "200000"),
        (HUGETLB | 21 << 26, (HUGE + 1, 2 * HUGE), "400000"),
        (HUGETLB | 30 << 26, (1, HUGE), "40000000"),
    ],
)
def test_memory_in_huge_pages_is_a_whole_number_of_them(strict, fresh, flags, sizes, end):
    fd = fresh()
    for size in sizes:
        assert create_mapping(fd, 0, size, 3, ANON | flags) == ""
        assert maps(strict) == [(f"{0:012x}-{end:0>12}", "rw-s")]


def test_unmap_takes_its_arguments_as_munmap_does(strict, fresh):
    fd = fresh()
    assert create_mapping(fd, 0, 4 * PAGE) == ""
    assert unmap(fd, 0, 0) == "EINVAL"
    assert unmap(fd, 1, PAGE) == "EINVAL"
    assert unmap(fd, ALIGNMENT, PAGE) == "EINVAL"
    assert unmap(fd, 0, ALIGNMENT + 1) == "EINVAL"
    assert unmap(fd, PAGE, ALIGNMENT) == "EINVAL"
    assert len(maps(strict)) == 1
    assert unmap(fd, PAGE, 1) == "", "one page"
    assert unmap(fd, PAGE, PAGE) == "", "nothing was there"
    assert maps(strict) == [
        ("000000000000-000000001000", "rw-s"),
        ("000000002000-000000004000", "rw-s"),
    ]
    assert unmap(fd, 0, ALIGNMENT) == ""
    assert maps(strict) == []


def test_whoever_may_only_read_may_change_the_table_all_the_same(strict, fresh):
    fd = fresh(ALIGNMENT, os.O_RDONLY)
    assert create_mapping(fd, 0, PAGE) == ""
    os.close(os.open(strict.path / "region", os.O_RDONLY))  # nor is the mode held to the table
    assert unmap(fd, 0, PAGE) == ""


def test_a_region_is_neither_read_nor_written(fresh):
    fd = fresh()
    assert create_mapping(fd, 0, PAGE) == ""
    assert attempt(os.read, fd, 1) == "EINVAL"
    assert attempt(os.write, fd, b"x") == "EINVAL"
    assert attempt(os.pread, fd, 1, PAGE) == "EINVAL"
    assert attempt(os.copy_file_range, fd, fd, 1, 0, PAGE) == "EINVAL"
    readable, writable = os.pipe()
    assert attempt(os.sendfile, writable, fd, 0, 1) == "EINVAL"
    os.close(readable)
    os.close(writable)


def test_bad_objects(strict, fresh, tmp_path):
    fd = fresh()
    assert create_mapping(fd, 0, PAGE, 1, SHARED | FIXED, obj=999) == "EBADF"
    assert create_mapping(fd, 0, PAGE, 1, SHARED | FIXED, obj=fd) == "EINVAL", "a region"
    write_only = os.open(tmp_path / "object", os.O_WRONLY | os.O_CREAT)
    os.ftruncate(write_only, PAGE)
    read_only = os.open(tmp_path / "object", os.O_RDONLY)
    assert create_mapping(fd, 0, PAGE, 1, SHARED | FIXED, obj=write_only) == "EACCES"
    assert create_mapping(fd, 0, PAGE, 3, SHARED | FIXED, obj=read_only) == "EACCES"
    flags = VALIDATE | FIXED | 1 << 30
    assert create_mapping(fd, 0, PAGE, 1, flags, obj=read_only) == "ENOTSUP"
    flags = SHARED | FIXED | HUGETLB
    assert create_mapping(fd, 0, PAGE, 1, flags, obj=read_only) == "EINVAL"
    os.close(read_only)
    os.close(write_only)
    assert maps(strict) == []


def test_what_may_have_a_name(strict, fresh):
    path = strict.path
    assert attempt(os.mknod, path / "n", stat.S_IFREG | 0o600) == "EPERM"
    assert attempt(os.mkfifo, path / "n") == "EPERM"
    assert attempt(os.symlink, "x", path / "n") == "EPERM"
    assert attempt(os.open, path, os.O_TMPFILE | os.O_RDWR) == "ENOTSUP"
    assert attempt(os.unlink, path / "mshare_info") == "EPERM"
    assert attempt(os.rename, path / "mshare_info", path / "n") == "EPERM"
    fresh()
    assert attempt(os.rename, path / "region", path / "mshare_info") == "EPERM"
    os.mkdir(path / "d")
    os.rename(path / "region", path / "d" / "moved")
    os.link(path / "d" / "moved", path / "region")
    os.unlink(path / "d" / "moved")
    os.rmdir(path / "d")


def test_locks_and_times_are_those_of_any_file(fresh):
    fd = fresh()
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.utime(fd, (1, 2))
    assert os.fstat(fd).st_mtime == 2


def test_a_region_costs_no_memory_until_it_is_touched(strict, fresh):
    before = strict.memory()
    fd = fresh(200 * ALIGNMENT)
    assert os.fstat(fd).st_size == 200 * ALIGNMENT
    assert create_mapping(fd, 0, 200 * ALIGNMENT) == ""
    assert unmap(fd, 0, 200 * ALIGNMENT) == ""
    assert os.fstat(fd).st_blocks == 0
    assert strict.memory() - before < 1 << 20


@pytest.mark.parametrize(
    "text", ["strict=v2", "strict", "strict=", "strict=v3,automap", "strict=v3,private=allow"]
)
def test_options_that_do_not_go_together(text):
    with pytest.raises(OptionError):
        MountOptions.parse(text)


def test_the_command_speaks_of_what_it_cannot_do(strict):
    path = strict.path / "by-command"

    def mshare(*words):
        command = [sys.executable, "-m", "msharefs.cli.main", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert mshare("create", path, "--size", "1G").returncode != 0
    assert not path.exists()
    assert mshare("create", path, "--size", "512G").returncode == 0
    place = (path, "--offset", "0", "--length", "4K")
    assert mshare("map", *place, "--anon", "--prot", "rw-").returncode == 0
    refused = mshare("protect", *place, "--prot", "r--")
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    print(refused.stderr)
    path.unlink()
