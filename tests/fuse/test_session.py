"""The life of a session in this process: starts that fail half-way, cancellation, one after another.

Nobody uses these mounts: whoever did would wait for the loop that this very process runs.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pyfuse3
import pytest
import trio

from msharefs.fuse import (
    FORWARD,
    Handlers,
    IoctlReply,
    MountError,
    Session,
    find_mounts,
    mount,
    mount_at,
    serve,
    unmount,
)


@pytest.fixture
def path(tmp_path):
    if not Path("/dev/fuse").exists():
        pytest.skip("/dev/fuse is missing (modprobe fuse)")
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "mnt"
    path.mkdir()
    before = open_files()
    yield path
    assert mount_at(path) is None
    assert open_files() == before
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fuse")]


def open_files() -> list[str]:
    """What this process has open, without what trio's event loop and pytest's capture have."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:
            continue
        if "fuse" in target or target.startswith(("socket:", "pipe:")):
            found.append(target)
    return sorted(found)


def handlers() -> Handlers:
    return Handlers(
        ioctl=lambda _: IoctlReply(),
        fallocate=lambda _: None,
        read=lambda _: FORWARD,
        opened=lambda _: None,
        errno_of=lambda *_: errno.EIO,
    )


@pytest.mark.parametrize("round_", range(3))
async def test_cancelling_unmounts(path, round_):
    """Three times: pyfuse3 holds its session in globals, and must let go of it."""
    agreed = []
    with trio.fail_after(30), trio.CancelScope() as scope:

        def ready(router):
            agreed.append(router.connection)
            assert mount_at(path).source == f"round{round_}"
            scope.cancel()

        await serve(pyfuse3.Operations(), path, handlers(), source=f"round{round_}", on_ready=ready)
    assert scope.cancelled_caught
    assert agreed[0].major == 7


async def test_what_on_ready_raises_ends_the_mount_and_comes_out(path):
    def refuse(_router):
        raise LookupError("not with this kernel")

    with trio.fail_after(30), pytest.raises(LookupError, match="not with this kernel"):
        await serve(pyfuse3.Operations(), path, handlers(), on_ready=refuse)


async def test_a_library_that_does_not_start_leaves_nothing(path, monkeypatch):
    def fail(*_):
        raise RuntimeError("fuse_session_new() failed")

    monkeypatch.setattr(pyfuse3, "init", fail)
    with trio.fail_after(30), pytest.raises(RuntimeError, match="fuse_session_new"):
        await serve(pyfuse3.Operations(), path, handlers())


async def test_a_session_without_descriptors_for_it_leaves_nothing(path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("msharefs.fuse.router.Downstream", fail)
    with pytest.raises(OSError, match="Too many open files"):
        await serve(pyfuse3.Operations(), path, handlers())


async def test_a_stop_that_comes_before_the_start(path):
    session = Session(
        pyfuse3.Operations(), mount(path, source="early"), handlers(), mountpoint=path
    )
    session.request_stop()
    session.request_stop()
    with trio.fail_after(30):
        await session.run()


async def test_a_session_without_a_mount_point_leaves_unmounting_to_others(path):
    session = Session(pyfuse3.Operations(), mount(path, source="other"), handlers())
    with trio.fail_after(30):
        await session.run(lambda _: session.request_stop())
    there = mount_at(path)
    assert there in find_mounts()

    unmount(path)


async def test_a_busy_mount_point_is_refused_before_anything_is_opened(path):
    device = mount(path, source="first")
    try:
        with pytest.raises(MountError, match="busy"):
            await serve(pyfuse3.Operations(), path, handlers())
    finally:
        os.close(device)

        unmount(path)
