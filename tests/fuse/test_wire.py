"""The protocol as values: whatever the bytes, a value or `BadFrame`; every reply well-formed."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.fuse import wire
from msharefs.fuse.decode import BadFrame, decode_request
from msharefs.fuse.handshake import amend_init_reply, amend_init_request
from msharefs.fuse.wire import (
    IN_HEADER,
    IN_SIZE,
    OUT_HEADER,
    OUT_SIZE,
    InitFlag,
    Opcode,
    build_ioctl_reply,
    build_reply,
    build_request,
    decode_reply_header,
)

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
UNIQUE = st.integers(1, 2**64 - 1)
NAME = st.binary(min_size=1, max_size=40).map(lambda raw: raw.replace(b"\0", b"x") + b"\0")

# The sizes of the fixed part of each body, and how many names follow: written out again, from
# the kernel's header, so that a slip in the decoder's table is seen.
FIXED = {
    Opcode.LOOKUP: (0, 1),
    Opcode.FORGET: (8, 0),
    Opcode.GETATTR: (16, 0),
    Opcode.SETATTR: (88, 0),
    Opcode.READLINK: (0, 0),
    Opcode.SYMLINK: (0, 2),
    Opcode.MKNOD: (16, 1),
    Opcode.MKDIR: (8, 1),
    Opcode.UNLINK: (0, 1),
    Opcode.RMDIR: (0, 1),
    Opcode.RENAME: (8, 2),
    Opcode.LINK: (8, 1),
    Opcode.OPEN: (8, 0),
    Opcode.READ: (40, 0),
    Opcode.STATFS: (0, 0),
    Opcode.RELEASE: (24, 0),
    Opcode.FSYNC: (16, 0),
    Opcode.GETXATTR: (8, 1),
    Opcode.LISTXATTR: (8, 0),
    Opcode.REMOVEXATTR: (0, 1),
    Opcode.FLUSH: (24, 0),
    Opcode.OPENDIR: (8, 0),
    Opcode.READDIR: (40, 0),
    Opcode.RELEASEDIR: (24, 0),
    Opcode.FSYNCDIR: (16, 0),
    Opcode.ACCESS: (8, 0),
    Opcode.CREATE: (16, 1),
    Opcode.INTERRUPT: (8, 0),
    Opcode.POLL: (24, 0),
    Opcode.FALLOCATE: (32, 0),
    Opcode.READDIRPLUS: (40, 0),
    Opcode.RENAME2: (16, 2),
    Opcode.LSEEK: (24, 0),
    Opcode.COPY_FILE_RANGE: (56, 0),
}


@st.composite
def valid_frames(draw) -> bytes:
    unique, nodeid = draw(UNIQUE), draw(U64)
    kind = draw(st.sampled_from([*FIXED, "ioctl", "write", "setxattr", "batch", "init"]))
    if kind == "ioctl":
        data = draw(st.binary(max_size=64))
        sizes = (len(data), draw(U32))
        body = struct.pack("<QIIQII", draw(U64), draw(U32), draw(U32), draw(U64), *sizes) + data
        return build_request(Opcode.IOCTL, unique, nodeid, body)
    if kind == "write":
        data = draw(st.binary(max_size=64))
        body = struct.pack("<QQIIQII", draw(U64), draw(U64), len(data), 0, 0, 0, 0) + data
        return build_request(Opcode.WRITE, unique, nodeid, body)
    if kind == "setxattr":
        value = draw(st.binary(max_size=64))
        body = struct.pack("<II", len(value), 0) + draw(NAME) + value
        return build_request(Opcode.SETXATTR, unique, nodeid, body)
    if kind == "batch":
        count = draw(st.integers(0, 5))
        body = struct.pack("<II", count, 0) + draw(st.binary(min_size=16, max_size=16)) * count
        return build_request(Opcode.BATCH_FORGET, unique, nodeid, body)
    if kind == "init":
        size = draw(st.sampled_from([16, 64]))
        return build_request(Opcode.INIT, unique, 0, draw(st.binary(min_size=size, max_size=size)))
    fixed, names = FIXED[kind]
    body = draw(st.binary(min_size=fixed, max_size=fixed))
    return build_request(kind, unique, nodeid, body + b"".join(draw(NAME) for _ in range(names)))


def decoded(frame):
    """The request, or the `BadFrame`: anything else is an error of the test."""
    try:
        return decode_request(frame)
    except BadFrame as bad:
        return bad


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(raw):
    result = decoded(raw)
    if isinstance(result, BadFrame):
        assert result.errno in (errno.EPROTO, errno.ENOSYS)
    if result.unique:
        assert IN_HEADER.unpack_from(raw)[2] == result.unique


@given(st.integers(0, 60) | U32, U64, st.binary(max_size=200))
def test_a_true_header_with_any_body_decodes_or_is_refused(opcode, unique, body):
    frame = IN_HEADER.pack(IN_SIZE + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body
    result = decoded(frame)
    if isinstance(result, BadFrame):
        known = opcode in Opcode.__members__.values()
        assert result.errno == (errno.EPROTO if known else errno.ENOSYS)
        assert result.unique == (0 if opcode in wire.UNANSWERED else unique)
    else:
        assert (result.opcode, result.unique) == (opcode, unique)


@given(valid_frames())
def test_a_valid_frame_decodes_to_what_it_says(frame):
    for given_as in (frame, bytearray(frame), memoryview(frame)):
        request = decode_request(given_as)
        _len, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(frame)
        assert (request.opcode, request.unique) == (opcode, unique)
        if hasattr(request, "nodeid"):
            assert request.nodeid == nodeid


@given(valid_frames(), st.data())
def test_a_valid_frame_cut_or_lengthened_is_refused(frame, data):
    _len, opcode, unique, *_ = IN_HEADER.unpack_from(frame)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(BadFrame):
        decode_request(frame[:cut])  # its length field no longer true
    with pytest.raises(BadFrame) as caught:
        decode_request(frame + b"\0")
    assert caught.value.unique == (0 if opcode in wire.UNANSWERED else unique)
    assert caught.value.errno == errno.EPROTO


@given(valid_frames(), st.integers(0, 400))
def test_a_valid_frame_that_lies_about_its_length_is_refused(frame, length):
    lie = struct.pack("<I", length + (length == len(frame))) + frame[4:]
    result = decoded(lie)
    assert isinstance(result, BadFrame)
    assert result.errno == errno.EPROTO


def test_a_frame_of_which_only_the_header_is_known_is_measured_too():
    frame = build_request(Opcode.STATX, 2, 1, b"whatever")
    assert decode_request(frame).opcode is Opcode.STATX
    with pytest.raises(BadFrame):
        decode_request(frame[:-1])


@given(valid_frames(), st.data())
def test_a_valid_frame_with_one_byte_changed_decodes_or_is_refused(frame, data):
    where = data.draw(st.integers(0, len(frame) - 1))
    changed = bytearray(frame)
    changed[where] ^= data.draw(st.integers(1, 255))
    result = decoded(bytes(changed))
    assert isinstance(result, BadFrame) or result.unique


@pytest.mark.parametrize(("opcode", "layout"), FIXED.items(), ids=str)
def test_each_layout_has_exactly_its_size(opcode, layout):
    fixed, names = layout
    body = bytes(fixed) + b"n\0" * names
    assert decode_request(build_request(opcode, 2, 1, body)).opcode is opcode
    for wrong in (body[:-1], body + b"\0", body + b"n\0"):
        if len(wrong) != len(body):
            with pytest.raises(BadFrame):
                decode_request(build_request(opcode, 2, 1, wrong))


@pytest.mark.parametrize("body", [b"", b"name", b"\0", b"a\0b\0", b"a\0b"])
def test_names_end_where_the_frame_ends(body):
    with pytest.raises(BadFrame):
        decode_request(build_request(Opcode.LOOKUP, 2, 1, body))


def test_request_values():
    ioctl = decode_request(
        IN_HEADER.pack(IN_SIZE + 36, Opcode.IOCTL, 8, 5, 1000, 100, 77, 0, 0)
        + struct.pack("<QIIQII", 3, 16 | 8, 0xC0047801, 0x7FFF, 4, 4)
        + b"abcd"
    )
    assert ioctl == wire.IoctlRequest(8, 5, 1000, 100, 77, 3, 24, 0xC0047801, 0x7FFF, b"abcd", 4)
    assert ioctl.is_dir
    assert ioctl.is_compat
    read = decode_request(
        build_request(Opcode.READ, 2, 9, struct.pack("<QQIIQII", 1, 4096, 512, 0, 0, 0o4000, 0))
    )
    assert (read.fh, read.offset, read.size, read.nonblocking) == (1, 4096, 512, True)
    allocate = decode_request(
        build_request(Opcode.FALLOCATE, 2, 9, struct.pack("<QQQII", 1, 10, 20, 3, 0))
    )
    assert (allocate.fh, allocate.offset, allocate.length, allocate.mode) == (1, 10, 20, 3)
    for flags in (0, 1):
        sync = decode_request(build_request(Opcode.FSYNC, 2, 9, struct.pack("<QII", 4, flags, 0)))
        assert (sync.fh, sync.data_only) == (4, bool(flags))
    write = decode_request(
        build_request(Opcode.WRITE, 2, 9, struct.pack("<QQIIQII", 1, 4096, 3, 0, 0, 2, 0) + b"abc")
    )
    assert (write.fh, write.offset, write.data, write.file_flags) == (1, 4096, b"abc", 2)
    create = decode_request(
        build_request(Opcode.CREATE, 2, 9, struct.pack("<IIII", 0o102, 0o644, 0, 0) + b"new\0")
    )
    assert create.create
    assert (create.flags, create.mode, create.name) == (0o102, 0o644, b"new")
    lookup = decode_request(build_request(Opcode.LOOKUP, 2, 9, b"name\0"))
    assert (lookup.opcode, lookup.nodeid, lookup.name) == (Opcode.LOOKUP, 9, b"name")
    forget = decode_request(build_request(Opcode.FORGET, 2, 9, struct.pack("<Q", 3)))
    assert forget.lookups == [(9, 3)]
    many = struct.pack("<IIQQQQ", 2, 0, 9, 3, 10, 1)
    assert decode_request(build_request(Opcode.BATCH_FORGET, 2, 0, many)).lookups == [
        (9, 3),
        (10, 1),
    ]


@given(UNIQUE, st.binary(max_size=100), st.integers(0, 511))
def test_every_reply_is_well_formed(unique, payload, error):
    if error and payload:
        with pytest.raises(ValueError, match="no reply"):
            build_reply(unique, payload, error)
        payload = b""
    reply = build_reply(unique, payload, error)
    length, sent_error, sent_unique = OUT_HEADER.unpack_from(reply)
    assert length == len(reply) == OUT_SIZE + len(payload)
    assert -511 <= sent_error <= 0
    assert sent_error == -error
    assert sent_unique == unique
    assert decode_reply_header(reply) == (unique, -error)
    assert decode_reply_header(reply + b"x") is None


@pytest.mark.parametrize("error", [-1, 512, 4095])
def test_no_reply_with_an_errno_that_the_kernel_refuses(error):
    with pytest.raises(ValueError, match="no reply"):
        build_reply(2, error=error)


def test_no_reply_to_nobody():
    with pytest.raises(ValueError, match="no reply"):
        build_reply(0)


@given(st.integers(-600, 2**31), st.binary(max_size=20))
def test_ioctl_replies_fit_or_are_refused(result, data):
    request = wire.IoctlRequest(2, 1, 0, 0, 0, 0, 0, 0, 0, b"", 10)
    fits = len(data) <= 10 and -511 <= result < 2**31
    if not fits:
        with pytest.raises(ValueError, match="ioctl"):
            build_ioctl_reply(request, result, data)
        return
    reply = build_ioctl_reply(request, result, data)
    assert decode_reply_header(reply) == (2, 0)
    assert wire.IOCTL_OUT.unpack_from(reply, OUT_SIZE) == (result, 0, 0, 0)
    assert reply[OUT_SIZE + 16 :] == data


def init_request(flags: int) -> bytes:
    words = (7, 44, 131072, flags & 0xFFFF_FFFF, flags >> 32)
    return build_request(Opcode.INIT, 2, 0, struct.pack("<IIIII44x", *words))


def test_init_is_amended_both_ways():
    offered = (
        InitFlag.INIT_EXT
        | InitFlag.MAX_PAGES
        | InitFlag.WRITEBACK_CACHE
        | InitFlag.ATOMIC_O_TRUNC
        | InitFlag.PASSTHROUGH
    )
    frame = init_request(offered)
    request = decode_request(frame)
    assert request.flags == offered
    assert decode_request(amend_init_request(frame)).flags == InitFlag.ATOMIC_O_TRUNC
    answer = struct.pack("<IIIIHHI", 7, 31, 131072, InitFlag.ATOMIC_O_TRUNC, 12, 9, 131072)
    reply, connection = amend_init_reply(build_reply(2, answer.ljust(64, b"\0")), request)
    assert len(reply) == OUT_SIZE + 64
    assert connection.passthrough
    assert not connection.resend  # not offered, so not taken
    assert connection.max_write == 131072
    fields = wire.INIT_OUT.unpack_from(reply, OUT_SIZE)
    assert fields[3] == InitFlag.ATOMIC_O_TRUNC | InitFlag.INIT_EXT
    assert fields[10] == InitFlag.PASSTHROUGH >> 32
    assert fields[11] == 2


def test_init_without_passthrough_offers_none():
    request = decode_request(init_request(InitFlag.ATOMIC_O_TRUNC))
    answer = struct.pack("<IIIIHHI", 7, 31, 131072, InitFlag.ATOMIC_O_TRUNC, 12, 9, 131072)
    _reply, connection = amend_init_reply(build_reply(2, answer), request)
    assert not connection.passthrough


@pytest.mark.parametrize("reply", [build_reply(2, error=errno.EPROTO), build_reply(2, b"1234")])
def test_init_that_the_library_refuses(reply):
    with pytest.raises(OSError) as caught:
        amend_init_reply(reply, decode_request(init_request(0)))
    assert caught.value.errno == errno.EPROTO
