"""The parts of the commands that need no mount: arguments, columns, exit codes, help, parsing."""

from __future__ import annotations

import doctest
import errno
import json
import os
import re
import shlex
import subprocess
import sys

import attrs
import click
import pytest
from click.testing import CliRunner

from msharefs import client, units
from msharefs.abi import ARGS_OF, Kind, Prot
from msharefs.cli import ioctl as ioctl_module
from msharefs.cli import ls, main, objects, query, types
from msharefs.cli.columns import HEX, SIZE, Column, Layout, choose
from msharefs.cli.exits import EXIT_CODES, HINTS, Exit, describe, status_of
from msharefs.cli.server import server
from msharefs.client import Mapping, NotAMount, parse_maps, union

COMMAND = [sys.executable, "-m", "msharefs.cli.main"]


def run(*arguments):
    """What a shell sees: status, standard output, standard error."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


# -- arguments


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("0x1000", 4096),
        ("0X1000", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4KB", 4096),
        ("64M", 64 << 20),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        ("0x1b", 27),
        (" 1M ", 1 << 20),
    ],
)
def test_sizes(text, size):
    assert types.size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "4Q", "K", "1.5M", "4 K", "0xg", "1e3", "4KKiB", "B"])
def test_what_is_no_size(text):
    with pytest.raises(click.BadParameter, match="not a size"):
        types.size(text)


@pytest.mark.parametrize(
    ("text", "prot"),
    [("rw-", Prot.READ | Prot.WRITE), ("r--", Prot.READ), ("none", Prot.NONE), ("---", Prot.NONE)],
)
def test_protections(text, prot):
    assert types.prot(text) == prot


@pytest.mark.parametrize("text", ["", "wr", "rwxx", "q", "3", "R"])
def test_what_is_no_protection(text):
    with pytest.raises(click.BadParameter, match="not a protection"):
        types.prot(text)


def test_modes():
    assert types.mode("640") == 0o640
    assert types.mode("01777") == 0o1777
    for text in ("", "8", "10000", "0o644", "-1", "rw"):
        with pytest.raises(click.BadParameter, match="not a mode"):
            types.mode(text)


def test_the_examples_in_docstrings():
    for module in (units,):
        found = doctest.testmod(module)
        assert found.attempted
        assert not found.failed


# -- columns


ROWS = [{"n": "a", "s": 1536, "o": 4096}, {"n": "b\n\x1b[0m", "s": None, "o": 0}]
TABLE = [
    Column("NAME", "its name", lambda row: row["n"]),
    Column("SIZE", "its size", lambda row: row["s"], SIZE, right=True),
    Column("MAJ:MIN", "where", lambda row: row["o"], HEX, default=False),
]


def shown(capsys, wanted=None, **options):
    settings = {"as_json": False, "headings": True, "as_bytes": False, **options}
    Layout(columns=choose(TABLE, wanted), **settings).show(ROWS, "rows")
    return capsys.readouterr().out


def test_a_table_is_aligned_and_one_line_a_row(capsys):
    assert shown(capsys).splitlines() == [
        "NAME       SIZE",
        "a          1.5K",
        "b\\n\\x1b[0m    -",
    ]


def test_bytes_and_noheadings(capsys):
    assert shown(capsys, "size", headings=False, as_bytes=True) == "1536\n   -\n"


def test_columns_beside_the_default_ones(capsys):
    assert shown(capsys, "+MAJ:MIN").splitlines()[0].split() == ["NAME", "SIZE", "MAJ:MIN"]


def test_json_has_numbers_and_keys_in_lower_case(capsys):
    assert json.loads(shown(capsys, "name,SIZE,maj:min", as_json=True)) == {
        "rows": [
            {"name": "a", "size": 1536, "maj:min": 4096},
            {"name": "b\n\x1b[0m", "size": None, "maj:min": 0},
        ]
    }


def test_a_column_that_is_none_is_told_with_those_that_are():
    with pytest.raises(click.BadParameter, match=r"no column 'BOGUS' .*NAME, SIZE, MAJ:MIN"):
        choose(TABLE, "NAME,BOGUS")
    with pytest.raises(click.BadParameter):
        choose(TABLE, "")


@pytest.mark.parametrize(
    "columns", [ls.COLUMNS, query.COLUMNS, objects.COLUMNS], ids=["ls", "query", "objects"]
)
def test_column_names_are_unique_and_have_help(columns):
    assert len({column.key for column in columns}) == len(columns)
    assert all(column.help for column in columns)
    assert columns[0].default


def test_the_keys_of_the_json_are_a_promise():
    assert {column.key for column in ls.COLUMNS} >= {
        *("name", "size", "mapped", "used", "prot", "mappings", "mode", "owner"),
        *("group", "open", "clients", "links", "inode", "path"),
    }
    assert {column.key for column in query.COLUMNS} >= {
        *("start", "end", "size", "prot", "kind", "objoffset", "maj:min", "inode", "path")
    }
    assert {column.key for column in objects.COLUMNS} >= {
        *("region", "start", "end", "size", "prot", "kind", "objoffset", "maj:min", "inode", "path")
    }


def test_lists_of_columns_complete_their_last_name():
    complete = types.complete_columns(TABLE)

    def completed(text):
        return [item.value for item in complete(None, None, text)]

    assert completed("") == ["NAME", "SIZE", "MAJ:MIN"]
    assert completed("s") == ["SIZE"]
    assert completed("NAME,s") == ["NAME,SIZE"]
    assert completed("NAME,N") == []
    assert completed("+M") == ["+MAJ:MIN"]


# -- exit codes


def test_every_status_is_explained():
    assert set(EXIT_CODES) == set(Exit)
    assert [int(code) for code in EXIT_CODES] == list(range(7))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (errno.EACCES, Exit.PERMISSION),
        (errno.EPERM, Exit.PERMISSION),
        (errno.EROFS, Exit.PERMISSION),
        (errno.EBUSY, Exit.BUSY),
        (errno.EEXIST, Exit.BUSY),
        (errno.ENOENT, Exit.NOT_FOUND),
        (errno.ENOTCONN, Exit.NOT_FOUND),
        (errno.EINVAL, Exit.FAILED),
        (errno.ENOSPC, Exit.FAILED),
    ],
)
def test_status_of_an_errno(code, status):
    assert status_of(OSError(code, os.strerror(code))) is status


def test_an_error_names_its_errno_and_what_helps():
    assert describe(OSError(errno.EBUSY, os.strerror(errno.EBUSY)), "because") == "EBUSY: because"
    plain = describe(OSError(errno.EBUSY, os.strerror(errno.EBUSY)))
    assert plain == f"EBUSY: {HINTS[errno.EBUSY]}"
    assert describe(OSError(errno.EXDEV, os.strerror(errno.EXDEV))).startswith("EXDEV: ")
    assert describe(NotAMount(errno.ENOENT, "no mount")) == "no mount"


def test_mistakes_are_one_line_and_point_to_help():
    for arguments in (
        ["bogus"],
        ["query"],
        ["create", "r"],
        ["create", "r", "--size", "many"],
        ["map", "r", "--anon", "x", "--offset", "0", "--prot", "r--"],
        ["map", "r", "--offset", "0", "--prot", "r--"],
        ["map", "r", "--anon", "--offset", "0", "--prot", "r--", "--object-offset", "4K"],
        ["query", "r", "-o", "BOGUS"],
        ["ioctl", "r", "bogus"],
        ["ioctl", "r", "-1"],
        ["ioctl", "r", "query", "bogus=1"],
        ["ioctl", "r", "0x40047899", "zz"],
        ["ioctl", "r", "0x40047899", "0011223344"],
        ["watch", "r", "--count", "0"],
        ["completion", "tcsh"],
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (Exit.USAGE, ""), arguments
        assert len(err.splitlines()) == 1, err
        assert err.startswith("mshare: ")
        assert "--help" in err


def test_without_a_command_the_help_is_shown():
    status, out, err = run()
    assert status in (Exit.OK, Exit.USAGE)
    assert (out + err).strip() == run("--help")[1].strip()


def test_debug_shows_where_an_error_came_from():
    status, _, err = run("--debug", "query", "/nowhere")
    assert status == Exit.NOT_FOUND
    assert "Traceback" in err
    assert "Traceback" not in run("query", "/nowhere")[2]


# -- help


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_help_has_examples_that_parse(name):
    """Each example is a command line that click takes (it is not run)."""
    found = main.mshare.get_command(click.Context(main.mshare), name)
    text = CliRunner().invoke(main.mshare, [name, "--help"]).output
    assert max(map(len, text.splitlines())) <= 80
    assert len(found.examples) >= 1
    for example in found.examples:
        assert example in text
        inner = re.sub(r'^eval "\$\((.*)\)"', r"\1", example)
        words = shlex.split(inner, comments=True)[1:]
        for stop in ("|", ">", "&&"):
            words = words[: words.index(stop)] if stop in words else words
        words = [word for word in words if not re.match(r"\d?[<>]", word)]
        assert words[0] == name, example
        main.mshare.make_context("mshare", words, resilient_parsing=False)
        found.make_context(name, words[1:])


def test_help_of_the_group_and_the_server():
    text = CliRunner().invoke(main.mshare, ["--help"]).output
    assert all(f"\n  {name} " in text for name in main.COMMANDS)
    assert "..." not in text.split("Commands:")[1], "summaries fit their line"
    assert all(f"\n  {int(code)}  " in text for code in Exit)
    assert "size=SIZE" in CliRunner().invoke(server, ["--help"]).output


def test_commands_for_scripts_load_no_event_loop():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from msharefs.cli.main import mshare\n"
        "CliRunner().invoke(mshare, ['--help'])\n"
        "CliRunner().invoke(mshare, ['query', '/nowhere'])\n"
        "print({n.split('.')[0] for n in sys.modules} & {'trio', 'pyfuse3', 'rich', 'psutil'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- ioctl


def test_fields_take_numbers_sizes_and_names():
    def packed(name, *words):
        command = ioctl_module.COMMANDS[name]
        return ARGS_OF[command].unpack(ioctl_module._struct(command, words))

    args = packed("map", "size=64K", "prot=rw-", "flags=MAP_SHARED|fixed|ANONYMOUS", "fd=-1")
    assert attrs.astuple(args) == (0, 65536, 0, 3, 0x31, 0xFFFFFFFF)
    assert packed("map").fd == 0xFFFFFFFF
    assert packed("unmap", "size=-1").size == 2**64 - 1
    notify = packed("notify", "events=read|write", "mode=signal", "signo=SIGUSR1", "on_timeout=1")
    assert (notify.events, notify.mode, notify.signo, notify.on_timeout) == (3, 1, 10, 1)


@pytest.mark.parametrize(
    "word", ["prot=4G", "prot=-3G", "size=zebra", "flags=BOGUS", "prot=zz", "size", "=1", "flags="]
)
def test_fields_that_cannot_be(word):
    with pytest.raises(click.UsageError):
        ioctl_module._struct(ioctl_module.COMMANDS["map"], (word,))


def test_the_number_of_i386_has_its_own_size():
    command = next(c for c in ARGS_OF if c.name == "CREATE_MAPPING_I386")
    assert len(ioctl_module._struct(command, ("size=4K",))) == 36


def test_answers_are_shown_by_name(capsys):
    query_args = ARGS_OF[ioctl_module.COMMANDS["query"]](prot=3, kind=1, start=4096, map_flags=0x21)
    ioctl_module._show(ioctl_module.COMMANDS["query"], query_args.pack(), as_json=False)
    out = capsys.readouterr().out.splitlines()
    assert {"prot=rw-", "kind=ANON", "start=0x1000", "map_flags=SHARED|ANONYMOUS"} <= set(out)


# -- the client's parsers


def test_lines_of_a_maps_file():
    text = (
        "000000001000-000000003000 rw-s 00000000 00:00 0 anon\n"
        "0000ffff0000-000100000000 r--s 00002000 08:1f 4711 file /a b\\134\\012c\r (deleted)\n"
        "000100000000-000100001000 rw-s 00000000 00:01 7 shmem /memfd:x (deleted)\n"
    )
    assert parse_maps(text) == [
        Mapping(0x1000, 0x2000, Prot.READ | Prot.WRITE, Kind.ANON),
        Mapping(0xFFFF0000, 0x10000, Prot.READ, Kind.FILE, 0x2000, (8, 31), 4711),
        Mapping(0x100000000, 0x1000, Prot.READ | Prot.WRITE, Kind.FILE, 0, (0, 1), 7),
    ]
    found = [(m.object_path, m.object_shmem) for m in parse_maps(text)]
    memfd = ("/memfd:x (deleted)", True)
    assert found == [(None, None), ("/a b\\\nc\r (deleted)", False), memfd]
    assert union(parse_maps(text)) == Prot.READ | Prot.WRITE
    assert parse_maps("") == []
    for line in (
        *("nonsense", "0-1 rw- 0 0:0 0 anon", "1000-2000 rw-s 0 00:00 0 7"),
        "1000-2000 rw-s 0 00:00 0 pipe",
    ):
        with pytest.raises(ValueError, match="maps file"):
            parse_maps(line)


def test_mount_points_with_odd_names(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    table.write_text(
        "29 1 0:26 / / rw - ext4 /dev/root rw\n"
        r"36 29 0:50 / /mnt/a\040b\134c rw shared:1 - fuse.msharefs my\040pool rw" + "\n"
        "37 36 0:51 / /mnt/a\\040b\\134c/inner rw - tmpfs none rw\n"
    )
    monkeypatch.setattr(client, "_MOUNT_TABLE", table)
    assert client.mounts() == [client.Mount("/mnt/a b\\c", "my pool")]
    assert client.connect().path == "/mnt/a b\\c"
    assert client.locate("/mnt/a b\\c/x/y")[1] == "x/y"
    assert client.locate("/mnt/a b\\c")[1] == ""
    with pytest.raises(NotAMount):
        client.locate("/mnt/a b\\c/inner/x")
    with pytest.raises(NotAMount):
        client.locate("/mnt/a b\\c2")
    with pytest.raises(NotAMount) as caught:
        client.connect("/mnt")
    assert caught.value.errno == errno.ENOENT
    table.write_text("")
    with pytest.raises(NotAMount):
        client.connect()
    table.write_text("".join(f"3{n} 1 0:5{n} / /m{n} rw - fuse.msharefs s rw\n" for n in range(2)))
    with pytest.raises(client.SeveralMounts, match="/m0, /m1"):
        client.connect()
