"""What mappings are that are listed as another filesystem's file: by where they were laid."""

from __future__ import annotations

from msharefs.abi import Prot
from msharefs.clients.procmap import MappedRange
from msharefs.clients.shown import Placed, Shown, translate

PAGE = 4096
DEVICE, INODE = 53, 2211
LISTED = DEVICE, INODE
ONE = Shown(16, (1, 4 * PAGE), 4 * PAGE, True)
TWO = Shown(24, (1, 0), 0, True)


def mapped(start, offset, inode=INODE, shared=True):
    return MappedRange(7, start, start + PAGE, Prot.READ, shared, offset, inode)


def placed():
    made = Placed()
    made.by_inode[40] = ONE
    return made


def seen(among, *found, own=None):
    return translate([], among, [(DEVICE, list(found))], own or {})


def test_a_piece_of_what_was_laid_is_a_part_of_the_region():
    among = placed()
    among.lay(LISTED, 10 * PAGE, ONE)
    (window,) = seen(among, mapped(12 * PAGE, 2 * PAGE))
    assert (window.inode, window.offset, window.shown) == (16, 6 * PAGE, ONE)
    assert among.devices == (DEVICE,)


def test_other_mappings_of_the_file_are_not():
    among = placed()
    among.lay(LISTED, 10 * PAGE, ONE)
    others = (
        mapped(12 * PAGE, PAGE),
        mapped(12 * PAGE, 2 * PAGE, inode=INODE + 1),
        mapped(12 * PAGE, 2 * PAGE, shared=False),
    )
    assert seen(among, *others) == []


def test_where_two_were_laid_alike_the_process_s_own_counts_then_the_last():
    among = placed()
    among.lay(LISTED, 10 * PAGE, ONE)
    among.lay(LISTED, 10 * PAGE, TWO)
    where = mapped(12 * PAGE, 2 * PAGE)
    assert among.doubtful
    assert [w.inode for w in seen(among, where)] == [24]
    assert [w.inode for w in seen(among, where, own={(*LISTED, 10 * PAGE): ONE})] == [16]
    among.lift(LISTED, 10 * PAGE, TWO)
    assert [w.inode for w in seen(among, where, own={(*LISTED, 10 * PAGE): TWO})] == [16]
    among.lift(LISTED, 10 * PAGE, ONE)
    assert seen(among, where) == []
    assert (among.devices, among.doubtful) == ((), False)
