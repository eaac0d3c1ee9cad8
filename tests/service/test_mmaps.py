"""The verdict on an mmap(), apart from the program that asks for it."""

from __future__ import annotations

import errno

import pyfuse3
import pytest
import trio

from msharefs.abi import Kind, MapFlag, Prot
from msharefs.clients.gate import Mmap
from msharefs.fuse.wire import GetxattrRequest
from msharefs.memory.store import Store
from msharefs.region.errors import Unsupported
from msharefs.region.semantics import AUTOMAP, Semantics
from msharefs.service.changes import Changes
from msharefs.service.errors import NoSuchAttribute
from msharefs.service.eventlog import EventLog
from msharefs.service.mmaps import Mmaps
from msharefs.service.nodes import Namespace

QUESTIONS = {
    b"private": Mmap(Prot.NONE, private=True),
    b"r": Mmap(Prot.READ, private=False),
    b"rw": Mmap(Prot.READ | Prot.WRITE, private=False),
}
FLAGS = int(MapFlag.SHARED | MapFlag.FIXED | MapFlag.ANONYMOUS)


class Rig:
    """A namespace with one region, mapped read-write, and the handler over it."""

    def __init__(self, admit=lambda *_: None, semantics=None) -> None:
        self.store = Store.open()
        self.changes = Changes(self.store, EventLog(), census=lambda _: [])
        self.names = Namespace(
            root_mode=0o1777,
            uid=0,
            gid=0,
            new_backing=self.store.new_backing,
            dropped=self.changes.dispose,
            **({"semantics": semantics} if semantics else {}),
        )
        self.file = self.names.create_region(self.names.root, b"r", 0o600, 0, 0)
        region = self.file.region
        region.apply_resize(region.plan_resize(8192))
        if not list(region.table):
            region.apply(region.plan_map(0, 4096, 3, FLAGS))
        assert all(m.object.kind is Kind.ANON for m in region.table)
        self.mmaps = Mmaps(self.names, self.changes, QUESTIONS.get, admit)

    def ask(self, name, ino=None):
        ino = self.file.ino if ino is None else ino
        return self.mmaps.getxattr(GetxattrRequest(2, ino, 0, 0, 0, name, 16))


@pytest.fixture
def make():
    made = []

    def make(*given, **more):
        made.append(Rig(*given, **more))
        return made[-1]

    yield make
    for rig in made:
        rig.names.clear()
        rig.store.close()


def verdict(call) -> int:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        call()
    return caught.value.errno


def test_the_rules_need_nobody_else(make):
    rig = make()
    assert rig.ask(b"rw") == b""
    assert verdict(lambda: rig.ask(b"private")) == errno.EINVAL
    # The kernel says EACCES to some callers by itself, so ours is spelt otherwise on the way.
    assert verdict(lambda: rig.ask(b"r")) == errno.EKEYREJECTED
    assert rig.changes.state(rig.file).counters["refuse"] == 2


def test_other_attributes_do_not_exist(make):
    with pytest.raises(NoSuchAttribute):
        make().ask(b"user.other")


def test_what_is_no_region_may_be_mapped(make):
    rig = make()
    for ino in (1, 2, 3, 12345):
        assert rig.ask(b"private", ino) == rig.ask(b"r", ino) == b""


def test_the_mounts_semantics_hold(make):
    assert make(semantics=AUTOMAP).ask(b"r") == b""
    rig = make(semantics=Semantics(private=True))
    assert rig.ask(b"private") == b""
    assert verdict(lambda: rig.ask(b"r")) == errno.EKEYREJECTED


def test_whom_the_rules_let_in_is_admitted_or_not(make):
    asked = []

    def admit(file, tid, prot):
        asked.append((file.region.name, tid, prot))
        if len(asked) == 2:
            raise Unsupported("cannot be had")

    rig = make(admit)
    assert rig.ask(b"rw") == b""
    assert verdict(lambda: rig.ask(b"rw")) == errno.EOPNOTSUPP
    verdict(lambda: rig.ask(b"r"))
    assert asked == [("r", 0, Prot.READ | Prot.WRITE)] * 2


def test_a_bug_costs_that_one_caller(make, caplog):
    rig = make(lambda *_: 1 / 0)
    assert verdict(lambda: rig.ask(b"rw")) == errno.EIO
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("refused", [False, True])
async def test_a_signal_does_not_interrupt_admission(make, refused):
    """The router cancels what answers an interrupted request; mmap() knows no EINTR."""
    go_on = trio.Event()

    async def admit(_file, _tid, _prot):
        await go_on.wait()
        if refused:
            raise Unsupported("cannot be had")

    rig, answers = make(admit), []

    async def answer():
        try:
            answers.append(await rig.ask(b"rw"))
        except pyfuse3.FUSEError as error:
            answers.append(error.errno)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            go_on.set()
    assert answers == [errno.EOPNOTSUPP if refused else b""]
