"""The lsm gate: two BPF programs that the kernel runs at every mmap() and mprotect().

For: loading ``bpf/mmap_gate.bpf.c`` with libbpf, telling it what to watch, and reading the names
by which it asks. The program's text says what it does and which way each of its branches fails.

Promises: once :meth:`LsmGate.open` has returned, the programs run: both have been seen to refuse a
call and to let one through. They end with this object, or with the process whatever ends it.

Leaves out: answering (``service/mmaps.py``); compiling (``scripts/setup --lsm``).

Source: Documentation/bpf/prog_lsm.rst and kfuncs.rst of the kernel; libbpf's bpf/libbpf.h, 1.0.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import secrets
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from msharefs import abi
from msharefs.clients.gate import GateUnavailable, Mmap
from msharefs.region.mapping import PROTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

OBJECT: Final = Path(__file__).parent.parent / "bpf" / "mmap_gate.bpf.o"
"""The compiled program. It suits every kernel that has what it uses: offsets are found on loading."""

SPELLING: Final = {errno.EACCES: errno.EKEYREJECTED}
"""How a verdict is spelt on its way to the program where the kernel could say the same word
itself: EACCES is also what it answers for a caller that may not read the file."""

_LIBRARY: Final = "libbpf.so.1"
_PREFIX: Final = b"user.msharefs."
_PLACE: Final = b"0" * 16
_NAMES: Final = b".rodata.names"
_PROGRAMS: Final = (b"mmap_gate", b"mprotect_gate")
_SETTINGS: Final = struct.Struct("=IIIIIII")
"""struct settings: mount, magic, memory, lenient, private, whole, zero."""
_FUSE_MAGIC: Final = 0x65735546
_TMPFS_MAGIC: Final = 0x01021994
"""Source of the magic numbers: linux/magic.h."""
_PRIVATE: Final = b"p"
_PROT_READ: Final = 1
_WARN: Final = 0
_SYS_LSM: Final = Path("/sys/kernel/security/lsm")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def kernel_device(st_dev: int) -> int:
    """``s_dev`` of the kernel for a ``st_dev`` of stat(2): the major number lies above bit 20."""
    return os.major(st_dev) << 20 | os.minor(st_dev)


def spell(code: int) -> int:
    """The errno to answer the program with so that mmap() fails with ``code``."""
    return SPELLING.get(code, code)


class LsmGate:
    """Use :meth:`open`. ``covers_mprotect``, so injected calls have to be announced."""

    kind: abi.Gate = abi.Gate.LSM
    covers_mprotect: bool = True

    def __init__(self, library: _Library, loaded: int, token: bytes) -> None:
        self._library = library
        self._object = loaded
        self._links: Sequence[int] = ()
        self._closing = threading.Lock()
        self._settings = self._borrowed = -1
        self._policy = (False, False, False)
        self._questions = {
            _PREFIX + token + b"." + name: question for name, question in _questions()
        }

    @classmethod
    def open(
        cls,
        canary: int,
        *,
        lenient: bool = False,
        private: bool = False,
        whole: bool = False,
        path: Path | None = None,
    ) -> Self:
        """Load, attach, and see that it works. Blocks for some tens of milliseconds.

        ``canary`` is a descriptor of a file on a filesystem of ours alone (a detached tmpfs), which
        is mapped and protected to see whether that is refused. ``lenient``: a caller about whom
        the daemon cannot be asked, because it may not read the file that it has a descriptor of,
        is let in and not refused; ``private``: with MAP_PRIVATE as well. ``whole``: mprotect() of
        a region's mapping is EINVAL, not EACCES. Raises GateUnavailable.
        """
        path = path or OBJECT
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise GateUnavailable(
                f"{path.name} is not there: compile it with scripts/setup --lsm"
            ) from None
        library = _Library.find()
        token = secrets.token_hex(len(_PLACE) // 2).encode()
        gate = cls(library, library.load(content, token), token)
        try:
            gate._settings = library.map_fd(gate._object, b"settings")
            gate._borrowed = library.map_fd(gate._object, b"borrowed")
            for name in _PROGRAMS:
                gate._links = (*gate._links, library.attach(gate._object, name))
            gate._test(canary)
            gate._policy = (lenient, private, whole)
            gate._set()
        except BaseException:
            gate.close()
            raise
        return gate

    # -- what is watched

    def add_mount(self, device: int, memory: int) -> None:
        """As in `Gate`."""
        self._set(kernel_device(device), kernel_device(memory))

    def remove_mount(self) -> None:
        """As in `Gate`."""
        self._set()

    def allow(self, tid: int) -> None:
        """As in `Gate`. Raises OSError if some 65,000 threads are borrowed at once."""
        self._library.update(self._borrowed, struct.pack("=I", tid), bytes(4))

    @property
    def borrowed(self) -> int:
        """The BPF map, by thread id (u32), in which :meth:`allow` notes the thread (u32, 0)."""
        return self._borrowed

    def disallow(self, tid: int) -> None:
        """As in `Gate`."""
        self._library.delete(self._borrowed, struct.pack("=I", tid))

    def question(self, name: bytes) -> Mmap | None:
        """What the program asks by an extended attribute of this name; None if it is not ours.

        Nobody else can know the names: part of them is a secret of this gate.
        """
        return self._questions.get(name)

    def close(self) -> None:
        """As in `Gate`."""
        with self._closing:
            links, self._links = self._links, ()
            for link in links:
                self._library.detach(link)
            if self._object:
                self._library.close(self._object)
                self._object = 0

    def _set(self, mount: int = 0, memory: int = 0, magic: int = _FUSE_MAGIC) -> None:
        settings = _SETTINGS.pack(mount, magic, memory, *self._policy, 0)
        self._library.update(self._settings, bytes(4), settings)

    # -- the self-test

    def _test(self, canary: int) -> None:
        """A program that is loaded and attached need not run: the boot's list of LSMs decides."""
        device = kernel_device(os.fstat(canary).st_dev)
        os.ftruncate(canary, mmap.PAGESIZE)
        # The daemon cannot answer for a file that is not on its mount: that fails closed.
        self._set(mount=device, magic=_TMPFS_MAGIC)
        if _errno_of(lambda: mmap.mmap(canary, mmap.PAGESIZE).close()) != errno.EACCES:
            raise GateUnavailable(_not_active())
        self._set(memory=device)
        with mmap.mmap(canary, mmap.PAGESIZE) as mapping:
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            if _errno_of(lambda: _mprotect(address)) != errno.EACCES:
                raise GateUnavailable("the program that watches mprotect() is attached, but idle")
            tid = threading.get_native_id()
            self.allow(tid)
            try:
                code = _errno_of(lambda: _mprotect(address))
            finally:
                self.disallow(tid)
            if code:
                raise GateUnavailable("thread ids of this pid namespace are not the kernel's own")


def _questions() -> list[tuple[bytes, Mmap]]:
    shared = [(prot.text().encode() + b"s", Mmap(prot, private=False)) for prot in PROTS]
    return [*shared, (_PRIVATE, Mmap(abi.Prot.NONE, private=True))]


def _mprotect(address: int) -> None:
    if _libc.mprotect(address, mmap.PAGESIZE, _PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")


def _errno_of(call: Callable[[], None]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _not_active() -> str:
    try:
        active = _SYS_LSM.read_text().strip()
    except OSError:
        active = "/sys/kernel/security is not mounted"
    return f"bpf is not in the list of active LSMs ({active}): boot with lsm=...,bpf"


class _Library:
    """The part of libbpf that is used. Pointers are numbers; errors are those of errno."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        self._lib = lib
        self._said: list[str] = []
        for name, result, arguments in (
            ("libbpf_set_print", pointer, [_PRINT]),
            ("bpf_object__open_mem", pointer, [text, ctypes.c_size_t, pointer]),
            ("bpf_object__load", number, [pointer]),
            ("bpf_object__close", None, [pointer]),
            ("bpf_object__find_map_by_name", pointer, [pointer, text]),
            ("bpf_object__find_program_by_name", pointer, [pointer, text]),
            ("bpf_map__initial_value", pointer, [pointer, ctypes.POINTER(ctypes.c_size_t)]),
            ("bpf_map__fd", number, [pointer]),
            ("bpf_program__attach", pointer, [pointer]),
            ("bpf_link__destroy", number, [pointer]),
            ("bpf_map_update_elem", number, [number, text, text, ctypes.c_uint64]),
            ("bpf_map_delete_elem", number, [number, text]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self._print = _PRINT(self._keep)  # libbpf holds on to it
        lib.libbpf_set_print(self._print)

    @classmethod
    def find(cls) -> Self:
        """Raises GateUnavailable."""
        try:
            return cls(ctypes.CDLL(_LIBRARY, use_errno=True))
        except OSError:
            raise GateUnavailable(f"{_LIBRARY} is not there (Debian: libbpf1)") from None
        except AttributeError as error:
            raise GateUnavailable(f"{_LIBRARY} is too old: {error}") from None

    def load(self, content: bytes, token: bytes) -> int:
        """The loaded object, its names completed by ``token``. Raises GateUnavailable."""
        opened = self._lib.bpf_object__open_mem(content, len(content), None)
        if not opened:
            raise GateUnavailable(f"{_LIBRARY} cannot read the program: {self._why()}")
        try:
            self._write_token(opened, token)
            if self._lib.bpf_object__load(opened):
                code, why = ctypes.get_errno(), self._why()
                if code == errno.EPERM:
                    raise GateUnavailable("loading BPF LSM programs is not permitted")  # noqa: TRY301 - the object is closed below
                raise GateUnavailable(f"the kernel does not take the program: {why}")  # noqa: TRY301 - as above
        except BaseException:
            self.close(opened)
            raise
        return int(opened)

    def _write_token(self, opened: int, token: bytes) -> None:
        size = ctypes.c_size_t()
        names = self._lib.bpf_object__find_map_by_name(opened, _NAMES)
        start = self._lib.bpf_map__initial_value(names, ctypes.byref(size)) if names else None
        if not start:
            raise GateUnavailable("the compiled program has no names: compile it again")
        ready = ctypes.string_at(start, size.value).replace(_PREFIX + _PLACE, _PREFIX + token)
        ctypes.memmove(start, ready, size.value)

    def attach(self, loaded: int, name: bytes) -> int:
        """The link of program ``name``. Raises GateUnavailable."""
        program = self._lib.bpf_object__find_program_by_name(loaded, name)
        link = self._lib.bpf_program__attach(program) if program else None
        if not link:
            raise GateUnavailable(f"{name.decode()} cannot be attached: {self._why()}")
        return int(link)

    def detach(self, link: int) -> None:
        self._lib.bpf_link__destroy(link)

    def close(self, opened: int) -> None:
        self._lib.bpf_object__close(opened)

    def map_fd(self, loaded: int, name: bytes) -> int:
        """Raises GateUnavailable."""
        found = self._lib.bpf_object__find_map_by_name(loaded, name)
        if not found:
            raise GateUnavailable(f"the compiled program has no map {name.decode()}")
        return int(self._lib.bpf_map__fd(found))

    def update(self, fd: int, key: bytes, value: bytes) -> None:
        if self._lib.bpf_map_update_elem(fd, key, value, 0):
            code = ctypes.get_errno()
            raise OSError(code, f"bpf_map_update_elem: {os.strerror(code)}")

    def delete(self, fd: int, key: bytes) -> None:
        if self._lib.bpf_map_delete_elem(fd, key):
            code = ctypes.get_errno()
            if code != errno.ENOENT:
                raise OSError(code, f"bpf_map_delete_elem: {os.strerror(code)}")

    def _keep(self, level: int, form: bytes, arguments: Any) -> int:
        """What libbpf and the kernel's verifier say, for the log; called by libbpf."""
        if level <= _WARN:
            line = ctypes.create_string_buffer(1 << 16)
            # On x86-64 a va_list is passed as a pointer, so it can be passed on as one.
            _libc.vsnprintf(line, len(line), form, ctypes.c_void_p(arguments))
            self._said.append(line.value.decode(errors="replace").strip())
        return 0

    def _why(self) -> str:
        """The errno's text; the whole story goes to the log."""
        code = ctypes.get_errno()
        said, self._said = self._said, []
        for line in said:
            log.debug("%s", line)
        return os.strerror(code)


_PRINT: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
