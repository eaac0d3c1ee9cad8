"""What an address space is said to map, in real processes, by both ways of reading /proc."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from msharefs.abi import Prot
from msharefs.clients.gone import Gone
from msharefs.clients.procmap import MappedRange, has_query
from msharefs.clients.space import FEW, AddressSpace
from tests.clients.puppet import PAGE, PRIVATE, SHARED, wait_until

READ, READ_WRITE = int(Prot.READ), int(Prot.READ | Prot.WRITE)


def held() -> list[str]:
    """What we have open of other processes."""
    names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sorted(name for name in names if name.endswith("/maps"))


@pytest.fixture
def opened():
    """Open address spaces, closed after the test without a descriptor left."""
    before = held()
    spaces: list[AddressSpace] = []

    def open_space(pid: int) -> AddressSpace:
        spaces.append(AddressSpace(pid))
        return spaces[-1]

    yield open_space
    for space in spaces:
        space.close()
        space.close()
    assert held() == before


def mapped(puppet, fd, pages, prot, flags=SHARED, first=0):
    return puppet.run(f"mmap(0, {pages * PAGE}, {prot}, {flags}, {fd}, {first * PAGE})")


def test_every_window_is_found_wherever_it_is(puppets, shm, opened, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    space = opened(puppet.pid)
    assert space.windows(device, inode) == []
    one = mapped(puppet, fd, 8, READ_WRITE, first=4)
    two = mapped(puppet, fd, 64, READ)
    puppet.run(f"mprotect({two + 16 * PAGE}, {16 * PAGE}, 0)")

    def window(address, pages, prot, first):
        start = address
        return MappedRange(
            puppet.pid, start, start + pages * PAGE, Prot(prot), True, first * PAGE, inode
        )

    assert space.windows(device, inode) == [
        window(two, 16, READ, 0),
        window(one, 8, READ_WRITE, 4),
        window(two + 16 * PAGE, 16, 0, 16),
        window(two + 32 * PAGE, 32, READ, 32),
    ]
    assert space.windows(device, inode + 1) == []
    assert space.windows(device + 1, inode) == []
    assert space.files(device) == {
        inode: sorted(space.windows(device, inode), key=lambda w: w.start)
    }

    moved = puppet.run(f"mmap(0, {8 * PAGE}, 0, {PRIVATE | 0x20}, 0, 0)")
    assert puppet.run(f"mremap({one}, {8 * PAGE}, {8 * PAGE}, 3, {moved})") == moved
    puppet.run(f"munmap({two}, {64 * PAGE})")
    assert space.windows(device, inode) == [window(moved, 8, READ_WRITE, 4)]


def test_private_mappings_are_seen_when_asked_for(puppets, shm, opened, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    space = opened(puppet.pid)
    address = mapped(puppet, fd, 2, READ_WRITE, PRIVATE)
    assert space.windows(device, inode) == []
    (window,) = space.windows(device, inode, private=True)
    assert (window.start, window.shared, window.offset) == (address, False, 0)
    assert space.files(device, private=True) == {inode: [window]}


def test_other_files_of_the_device_are_kept_apart(puppets, shm, opened, way, tmp_path):
    fd, device, inode = shm
    other = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(other, PAGE)
    puppet = puppets(fd, other)
    mapped(puppet, fd, 1, READ)
    mapped(puppet, other, 1, READ)
    space = opened(puppet.pid)
    files = space.files(device)
    assert files.keys() == {inode, os.fstat(other).st_ino}
    assert [len(windows) for windows in files.values()] == [1, 1]
    os.close(other)


def test_what_mprotect_could_give_is_what_the_descriptor_gave(puppets, shm, opened):
    fd, device, inode = shm
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    puppet = puppets(fd, read_only)
    space = opened(puppet.pid)
    address = mapped(puppet, read_only, 1, READ)
    (window,) = space.windows(device, inode)
    assert space.may(window) == Prot.READ | Prot.EXEC
    puppet.run(f"munmap({address}, {PAGE})")
    with pytest.raises(Gone):
        space.may(window)
    mapped(puppet, fd, 1, 0)
    (window,) = space.windows(device, inode)
    assert (window.prot, space.may(window)) == (0, Prot.READ | Prot.WRITE | Prot.EXEC)
    os.close(read_only)


def test_exec_ends_the_address_space_and_not_the_process(puppets, shm, opened, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapped(puppet, fd, 1, READ)
    space = opened(puppet.pid)
    (window,) = space.windows(device, inode)
    puppet.execute("sleep", "1000")
    for look in (
        lambda: space.windows(device, inode),
        lambda: space.files(device, private=True),
        lambda: space.may(window),
        space.check,
    ):
        with pytest.raises(Gone):
            look()
    assert not space.process_ended()
    after = opened(puppet.pid)
    assert after.windows(device, inode) == []
    puppet.kill()
    assert space.process_ended()
    with pytest.raises(Gone):
        after.windows(device, inode)
    with pytest.raises(Gone):
        AddressSpace(puppet.pid)


def test_kernel_threads_have_none(way):
    with pytest.raises(Gone):
        AddressSpace(2)


def test_a_process_whose_first_thread_has_ended(puppets, shm, opened, way):
    fd, device, inode = shm
    puppet = puppets(fd)
    mapped(puppet, fd, 1, READ)
    puppet.do("import threading, signal; threading.Thread(target=signal.pause).start()")
    puppet.send("libc.syscall(60, 0)")  # exit(2): this thread alone
    wait_until(lambda: "Z" in Path(f"/proc/{puppet.pid}/task/{puppet.pid}/stat").read_text())
    space = opened(puppet.pid)
    assert space.tid != puppet.pid
    (window,) = space.windows(device, inode)
    assert window.pid == puppet.pid
    assert space.may(window) == Prot.READ | Prot.WRITE | Prot.EXEC
    puppet.kill()


def test_shared_memory_is_told_from_a_copy(puppets, opened):
    puppet = puppets()
    child = puppet.fork()
    sharer = puppet.run(
        "libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p),"
        " ctypes.c_void_p(mmap(0, 65536, 3, 0x22, -1, 0) + 65536), 0x100 | 17, None)"
    )
    one, two, three = opened(puppet.pid), opened(child.pid), opened(sharer)
    assert one.same_as(three)
    assert three.same_as(one)
    assert not one.same_as(two)
    assert one.order(two) == -two.order(one) != 0
    os.kill(sharer, signal.SIGKILL)
    child.kill()
    with pytest.raises(Gone):
        one.same_as(two)


# -- a part of very many


@pytest.fixture
def many(puppets, shm, opened):
    """A process that has each second page of its region read-only, and its address space."""
    if not has_query():
        pytest.skip("PROCMAP_QUERY is missing (Linux 6.11)")
    fd, device, inode = shm
    puppet = puppets(fd)
    base = mapped(puppet, fd, 64, READ_WRITE)
    puppet.do(f"for n in range(0, 64, 2): mprotect({base} + n * PAGE, PAGE, 1)")
    space = opened(puppet.pid)
    assert len(space.windows(device, inode)) == 64 > FEW
    return puppet, space, base


def pages(windows):
    return [(w.start, w.offset // PAGE, int(w.prot)) for w in windows]


@pytest.mark.parametrize(("low", "high"), [(0, 3), (20, 22), (21, 22), (61, 64), (0, 64)])
def test_a_part_is_that_part_of_all(many, shm, low, high):
    puppet, space, base = many
    _, device, inode = shm
    part = (low * PAGE, high * PAGE)
    expected = [(base + n * PAGE, n, 1 if n % 2 == 0 else 3) for n in range(low, high)]
    assert pages(space._windows_of_part(device, inode, part)) == expected
    assert pages(space.windows(device, inode, part)) == expected
    # A second window far away, and a change in between, are seen as well.
    extra = mapped(puppet, shm[0], high - low, READ, first=low)
    puppet.run(f"mprotect({base + low * PAGE}, {PAGE}, 0)")
    found = space.windows(device, inode, part)
    assert (base + low * PAGE, low, 0) in pages(found)
    assert (extra, low, READ) in pages(found)
    assert sorted(found, key=str) == sorted(
        (
            w
            for w in space.windows(device, inode)
            if w.offset < part[1] and w.offset + w.end - w.start > part[0]
        ),
        key=str,
    )


def test_a_region_mapped_anew_over_its_old_place_is_found(many, shm):
    """Smaller, or at another offset: the ends are no longer where they were."""
    puppet, space, base = many
    fd, device, inode = shm
    puppet.run(f"munmap({base}, {64 * PAGE})")
    assert puppet.run(f"mmap({base + PAGE}, {8 * PAGE}, 3, {SHARED | 0x10}, {fd}, {40 * PAGE})")
    assert space._windows_of_part(device, inode, (40 * PAGE, 41 * PAGE)) is None
    found = space.windows(device, inode, (40 * PAGE, 41 * PAGE))
    assert pages(found) == [(base + PAGE, 40, 3)]
    assert space._layouts[device, inode] == (), "few again: everything is looked at"


def test_a_part_of_what_has_gone_raises(many, shm):
    puppet, space, _ = many
    puppet.kill()
    with pytest.raises(Gone):
        space.windows(shm[1], shm[2], (0, PAGE))


def test_closing_while_others_look(many, shm):
    """Whoever looks gets an answer or Gone, and never another file's descriptor."""
    _, _, _ = many
    puppet = many[0]
    wrong: list[object] = []

    def look(space: AddressSpace) -> None:
        try:
            while True:
                if len(space.windows(shm[1], shm[2])) != 64:
                    wrong.append("incomplete")
        except Gone:
            pass
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    before = held()
    for _ in range(20):
        space = AddressSpace(puppet.pid)
        threads = [threading.Thread(target=look, args=[space]) for _ in range(3)]
        for thread in threads:
            thread.start()
        space.windows(shm[1], shm[2])
        space.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert not wrong
    assert held() == before
