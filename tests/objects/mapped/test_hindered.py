"""Who cannot be shown a file: nothing changes for anybody, or it does not get in."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess

import pytest

from tests.conftest import GATE
from tests.deaths.conftest import (  # noqa: F401 - fixtures
    PAGE,
    SIGSEGV,
    SIZE,
    clients,
    does_not_come_in,
    place,
    programs,
    status,
    until,
)

A, B = str(ord("a")), str(ord("b"))
"""What the first two pages of the file are full of."""


@pytest.fixture(params=["best", "strict"])
def at(place, request):  # noqa: F811
    """It does not matter here what the policy is."""
    return place(f"enforce={request.param}")


def elsewhere(tmp_path):
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    return directory


def refused(code, call, *arguments, **keywords):
    with pytest.raises(OSError) as caught:
        call(*arguments, **keywords)
    assert caught.value.errno == code, caught.value


def map_now(client, fd, size=SIZE):
    return client.do(f"map {fd} {size} 0 3")


def change_refused(at, fd, code, client, good, offset=0):
    """CREATE_MAPPING fails; both go on as if nothing had been asked for."""
    assert good.store(PAGE, 7) == client.store(PAGE, 7) == "ok"
    refused(code, at.region.map, offset, 2 * PAGE, "rw-", fd=fd)
    assert [(m.start, m.size, m.kind) for m in at.region] == [(0, SIZE, 1)]
    for one in (client, good):
        assert (one.load(0), one.load(PAGE)) == ("0", "7")
    for one in (client, good):
        assert [one.store(page * PAGE) for page in range(16)] == ["ok"] * 16


def change_goes_well(at, fd, *seen_by):
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    for one in seen_by:
        assert (one.load(0), one.load(PAGE)) == (A, B)


def test_traced_by_somebody_else(at, clients, make):  # noqa: F811
    fd, tracer, one, good = make(), clients(), clients(), clients()
    one.map(at.path)
    good.map(at.path)
    assert tracer.do(f"trace {one.pid}") == "ok"
    change_refused(at, fd, errno.EPERM, one, good)
    assert tracer.do(f"untrace {one.pid}") == "ok"
    change_goes_well(at, fd, one, good)


def test_traced_it_does_not_come_in(at, clients, make):  # noqa: F811
    fd, tracer, one = make(), clients(), clients()
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    assert tracer.do(f"trace {one.pid}") == "ok"
    does_not_come_in(one, at.path)
    assert at.event("refuse")["reason"] == f"traced by process {tracer.pid}"
    assert tracer.do(f"untrace {one.pid}") == "ok"
    assert one.map(at.path).load(0) == A


def test_a_seccomp_filter(at, clients, make):  # noqa: F811
    fd, one, good = make(), clients(), clients()
    one.map(at.path)
    good.map(at.path)
    assert one.do("filter") == "ok"
    change_refused(at, fd, errno.EPERM, one, good)
    one.end()
    change_goes_well(at, fd, good)
    other = clients()
    assert other.do("filter") == "ok"
    does_not_come_in(other, at.path)


def test_below_another_root(at, clients, make, tmp_path):  # noqa: F811
    fd, one, good = make(), clients(), clients()
    one.map(at.path)
    good.map(at.path)
    assert one.do(f"chroot {elsewhere(tmp_path)}") == "ok"
    change_refused(at, fd, errno.EPERM, one, good)
    one.end()
    change_goes_well(at, fd, good)


def test_below_another_root_its_mmap_fails(at, clients, make, tmp_path):  # noqa: F811
    fd, one = make(), clients()
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    where = one.open(at.path)
    assert where >= 0
    assert one.do(f"chroot {elsewhere(tmp_path)}") == "ok"
    assert map_now(one, where) == str(-errno.EPERM)
    assert at.standing(one.pid) is None
    assert "does not see the mount" in at.event("refuse")["reason"]
    one.end()


def test_the_mount_as_its_root(at, clients, make):  # noqa: F811
    fd, one = make(), clients()
    assert one.do(f"chroot {at.served.path}") == "ok"
    one.map("/r")
    change_goes_well(at, fd, one)
    one.end()


def test_in_a_mount_namespace(at, clients, make):  # noqa: F811
    if not shutil.which("unshare"):
        pytest.skip("unshare is missing")
    tried = ["unshare", "--mount", "--propagation", "private", "true"]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("unshare cannot make a mount namespace here")
    fd, one = make(), clients(*tried[:-1])
    one.map(at.path)
    change_goes_well(at, fd, one)
    one.end()


def test_no_descriptor_is_free(at, clients, make):  # noqa: F811
    fd, one, good = make(), clients(), clients()
    one.map(at.path)
    good.map(at.path)
    assert one.do("nofile") == "ok"
    change_refused(at, fd, errno.EMFILE, one, good)
    one.end()
    change_goes_well(at, fd, good)


def test_no_mapping_is_free(at, clients, make):  # noqa: F811
    fd, one, good = make(), clients(), clients()
    one.map(at.path)
    good.map(at.path)
    assert one.do("fill") == "ok"
    change_refused(at, fd, errno.ENOMEM, one, good, 4 * PAGE)
    one.end()
    change_goes_well(at, fd, good)


def test_another_user(at, clients, make):  # noqa: F811
    fd, one = make(), clients()
    one.map(at.path)
    assert one.do("user 65534") == "ok"
    os.chmod(at.path.parent.parent, 0o711)
    parents = [at.path.parent.parent, *at.path.parent.parent.parents]
    if any(not parent.stat().st_mode & 0o001 for parent in parents):
        refused(errno.EPERM, at.region.map, 0, 2 * PAGE, "rw-", fd=fd)
        assert (one.load(0), one.store(0)) == ("0", "ok")
    else:
        change_goes_well(at, fd, one)
    one.end()


def test_stopped(at, clients, make):  # noqa: F811
    fd, one = make(), clients()
    one.map(at.path)
    one.kill(signal.SIGSTOP)
    change_goes_well(at, fd)
    one.kill(signal.SIGCONT)
    assert one.load(PAGE) == B
    one.end()


def test_several_threads_the_first_of_which_has_ended(at, clients, make):  # noqa: F811
    fd, one = make(), clients()
    one.map(at.path)
    assert one.do("threads 3") == "ok"
    change_goes_well(at, fd, one)


def test_placements_are_opened_by_nobody_else(at, clients, make):  # noqa: F811
    fd, one = make(), clients().map
    client = one(at.path)
    at.region.map(0, PAGE, "rw-", fd=fd)
    assert client.load(0) == A
    with open(f"/proc/{client.pid}/maps") as maps:
        (path,) = [line.split()[5] for line in maps if "/.objects/" in line]
    directory = os.path.dirname(path)
    assert os.listdir(directory) == []
    assert ".objects" not in os.listdir(at.served.path)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_DIRECT):
        refused(errno.EACCES, os.open, path, flags)
    assert client.open(path) == -errno.EACCES
    refused(errno.EPERM, os.truncate, path, 0)
    refused(errno.EPERM, os.chmod, path, 0)
    refused(errno.EPERM, os.unlink, path)
    refused(errno.EPERM, os.open, f"{directory}/new", os.O_CREAT | os.O_RDWR)
    refused(errno.EPERM, os.mkdir, f"{directory}/new")
    refused(errno.EPERM, os.rename, path, at.served.path / "mine")
    refused(errno.ENOENT, os.stat, f"{directory}/0{os.path.basename(path)}")
    refused(errno.ENOENT, os.stat, f"{directory}/99999999")
    assert os.stat(path).st_size == 0
    assert client.load(0) == A


def test_the_caller_itself_is_shown_it_too(at, clients, make):  # noqa: F811
    """Who asks for the change waits for it: it is dealt with as its call ends."""
    fd = make()
    with mmap.mmap(at.region.fd, SIZE) as own:
        at.region.map(0, 2 * PAGE, "rw-", fd=fd)
        assert (own[0], own[PAGE]) == (ord("a"), ord("b"))
        own[0] = ord("!")
        assert os.pread(fd, 1, 0) == b"!"
        at.region.unmap(PAGE, PAGE)
        at.region.map(0, 2 * PAGE, "rw-")
        assert (own[0], own[PAGE]) == (0, 0)


def test_killed_while_it_is_being_shown_files(at, clients, make):  # noqa: F811
    fd, good = make(), clients().map(at.path)
    # While the gate follows who has opened, a child's end interrupts its calls: see signal(7).
    until(lambda: status(os.getpid(), "TracerPid") == "0", "to be let go by the gate")
    for _ in range(15):
        one = clients().map(at.path)
        one.kill()
        at.region.map(0, 2 * PAGE, "rw-", fd=fd)
        assert (good.load(0), good.load(PAGE)) == (A, B)
        at.region.map(0, 2 * PAGE, "rw-")
        assert (good.load(0), good.load(PAGE)) == ("0", "0")
        assert one.gone() == -signal.SIGKILL
    until(
        lambda: {line.split()[0] for line in at.standing_clients().splitlines()} == {str(good.pid)},
        "the living alone to be listed",
    )


def test_the_server_is_killed_and_the_file_stays(at, clients, make):  # noqa: F811
    fd, one = make(), clients().map(at.path)
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    at.region.protect(PAGE, PAGE, "r--")
    at.served.process.kill()
    at.served.process.wait()
    at.served.expect_exit = -signal.SIGKILL
    assert (one.load(0), one.load(PAGE)) == (A, B)
    assert one.store(0, ord("!")) == "ok"
    assert os.pread(fd, 1, 0) == b"!"
    assert one.store(PAGE) == f"{SIGSEGV} {PAGE}"
    os.pwrite(fd, b"?", PAGE)
    assert one.load(PAGE) == str(ord("?"))
    one.end()
    subprocess.run(["umount", "-l", at.served.path], check=True)


def opened_long_ago(at, one):
    """It has a descriptor, and the ptrace gate follows it no more (that of lsm never does)."""
    where = one.open(at.path)
    assert where >= 0
    until(lambda: status(one.pid, "TracerPid") == "0", "to be let go by the gate")
    return where


def census(at):
    """Opening and closing a region is a reason to look who maps it."""
    os.close(os.open(at.path, os.O_RDWR))


def test_found_by_the_census_it_is_shown_the_file(at, clients, make):  # noqa: F811
    fd, one = make(), clients()
    where = opened_long_ago(at, one)
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    assert map_now(one, where) == "ok"
    census(at)
    until(lambda: at.state(one.pid) == "replica", "to be adopted")
    assert (one.load(0), one.load(PAGE), one.load(2 * PAGE)) == (A, B, "0")
    one.end()


def test_found_by_the_census_and_not_to_be_shown_it_sees_nothing(
    at,
    clients,  # noqa: F811
    make,
    tmp_path,
    request,
):
    fd, one = make(), clients()
    where = opened_long_ago(at, one)
    assert one.do(f"chroot {elsewhere(tmp_path)}") == "ok"
    at.region.map(0, 2 * PAGE, "rw-", fd=fd)
    if GATE == "lsm":  # it sees every mmap() but those of who may not read the file
        at.path.chmod(0o600)
        assert one.do("user 65534") == "ok"
        if request.node.callspec.params["at"] == "strict":
            assert map_now(one, where) == str(-errno.EACCES)
            one.end()
            return
    assert map_now(one, where) == "ok"
    census(at)
    until(lambda: one.load(0) == f"{SIGSEGV} 0", "to be shut out")
    assert one.load(PAGE) == f"{SIGSEGV} {PAGE}"
    assert one.load(2 * PAGE) == "0"
    state, why = at.standing(one.pid)
    assert state == "unenforced"
    assert "does not see the mount" in why
    refused(errno.EPERM, at.region.protect, 0, PAGE, "r--")
    at.region.unmap(0, 2 * PAGE)
    one.end()
