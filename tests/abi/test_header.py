"""include/msharefs.h and abi.py say the same: checked by compiling, in C99, C++17 and 32 bits.

The program is generated from abi.py, so what abi.py has and the header lacks does not compile.
What the header has and abi.py lacks is found by reading the names the header defines.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import msharefs
from msharefs import abi

HEADER = Path(msharefs.__file__).parent / "include" / "msharefs.h"

# What an enum's members are called in C. Prot and MapFlag have mmap(2)'s own names.
PREFIXES = {
    abi.Prot: "PROT_",
    abi.MapFlag: "MAP_",
    abi.Kind: "MSHAREFS_KIND_",
    abi.QueryFlag: "MSHAREFS_QUERY_",
    abi.NotifyEvent: "MSHAREFS_NOTIFY_",
    abi.NotifyMode: "MSHAREFS_NOTIFY_",
    abi.NotifyFlag: "MSHAREFS_NOTIFY_",
    abi.OnTimeout: "MSHAREFS_ON_TIMEOUT_",
    abi.Gate: "MSHAREFS_GATE_",
    abi.Feature: "MSHAREFS_FEATURE_",
    abi.Command: "MSHAREFS_",
}
CONSTANTS = {
    "MSHAREFS_ABI_VERSION": abi.ABI_VERSION,
    "MSHAREFS_PAGE_SIZE": abi.PAGE_SIZE,
}
I386_ONLY = abi.Command.CREATE_MAPPING_I386
STRUCTS = {args.NAME: args for args in abi.ARGS_OF.values()}

BUILDS = {
    "C99": ["gcc", "-std=c99", "-x", "c"],
    "C++17": ["gcc", "-std=c++17", "-x", "c++"],  # not g++: a program for i386 needs no libstdc++
    "C99 for i386": ["gcc", "-m32", "-std=c99", "-x", "c"],
    "C++17 for i386": ["gcc", "-m32", "-std=c++17", "-x", "c++"],
}
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


def c_fields(args: type[abi.Args]) -> dict[str, str]:
    """The name of each field and how C reaches it: ``reserved0`` begins an array ``reserved[]``."""
    names = args.field_names()
    if "reserved0" not in names:
        return {name: name for name in names}
    return {name: re.sub(r"^reserved(\d)$", r"reserved[\1]", name) for name in names}


def layout(args: type[abi.Args], form: struct.Struct) -> dict[str, list[int]]:
    """Offset and size of each field, and the struct's size, as the Python format has them."""
    assert re.fullmatch(r"=[A-Z]+(4x)?", form.format), "one letter a field, native order, unpadded"
    sizes = [struct.calcsize(f"={code}") for code in form.format[1:].removesuffix("4x")]
    names = args.field_names()
    assert len(sizes) == len(names)
    fields = {name: [sum(sizes[:i]), sizes[i]] for i, name in enumerate(names)}
    return {**fields, "struct": [0, form.size]}


def numbers() -> dict[str, int]:
    """Every number of abi.py under its C name."""
    names = dict(CONSTANTS)
    for _, kind in inspect.getmembers(abi, inspect.isclass):
        if issubclass(kind, enum.Enum) and kind.__module__ == abi.__name__:
            for name, member in kind.__members__.items():
                if member is not I386_ONLY:
                    names[PREFIXES[kind] + name] = int(member)
    return names


def program() -> str:
    lines = [f'#include "{HEADER}"', "#include <stddef.h>", "#include <stdio.h>"]
    lines += ["#include <sys/mman.h>", "int main(void) {", 'printf("{\\"structs\\": {\\n");']
    for name, args in STRUCTS.items():
        lines.append(f'printf("\\"{name}\\": {{");')
        lines += [
            f'printf("\\"{field}\\": [%lu, %lu], ", (unsigned long)offsetof(struct {name}, {c}),'
            f" (unsigned long)sizeof(((struct {name} *)0)->{c}));"
            for field, c in c_fields(args).items()
        ]
        lines.append(
            f'printf("\\"struct\\": [0, %lu]}},\\n", (unsigned long)sizeof(struct {name}));'
        )
    lines.append('printf("\\"\\": {}}, \\"numbers\\": {\\n");')
    lines += [f'printf("\\"{name}\\": %lu,\\n", (unsigned long){name});' for name in numbers()]
    lines += ['printf("\\"\\": 0}}\\n");', "return 0;", "}"]
    return "\n".join(lines) + "\n"


def needs(*command: str) -> None:
    """Skips the test unless that compiler makes programs."""
    if shutil.which(command[0]) is None:
        pytest.skip("gcc is missing")
    trial = subprocess.run(
        [*command, "-", "-o", "/dev/null"],
        input=b"#include <stdint.h>\nint main(void) { return 0; }\n",
        capture_output=True,
        check=False,
    )
    if trial.returncode:
        pytest.skip(f"{'gcc-multilib' if '-m32' in command else 'g++'} is missing")


@pytest.fixture(params=BUILDS, scope="module")
def build(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(build, tmp_path_factory):
    command = BUILDS[build]
    needs(*command)
    directory = tmp_path_factory.mktemp("abi")
    source = directory / "abi.c"
    source.write_text(program())
    binary = directory / "abi"
    made = subprocess.run(
        [*command, "-D_GNU_SOURCE", *STRICT, "-o", binary, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    output = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    return json.loads(output)


def test_structs_have_the_layout_of_abi(compiled, build):
    for name, args in STRUCTS.items():
        form = args.LAYOUT
        if build.endswith("i386") and args is abi.CreateArgs:
            form = abi.CreateArgs.LAYOUT_I386
        assert compiled["structs"][name] == layout(args, form), name


def test_numbers_are_those_of_abi(compiled, build):
    expected = numbers()
    if build.endswith("i386"):
        expected["MSHAREFS_CREATE_MAPPING"] = int(I386_ONLY)
    assert {k: v for k, v in compiled["numbers"].items() if k} == expected


def test_known_numbers():
    """The numbers that other people's programs were compiled with never change."""
    assert {command.name: hex(command) for command in abi.Command} == {
        "CREATE_MAPPING": "0x40287800",
        "CREATE_MAPPING_I386": "0x40247800",
        "UNMAP": "0x40107801",
        "PROTECT": "0x40187810",
        "QUERY": "0xc0487811",
        "NOTIFY": "0x40287812",
        "SYNC": "0x40187813",
        "INFO": "0x80407814",
    }


def test_header_has_nothing_that_abi_lacks():
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    defined = set(re.findall(r"^#define (\w+)[ \t]+\S", text, flags=re.MULTILINE))
    assert defined == {name for name in numbers() if name.startswith("MSHAREFS_")}
    assert set(re.findall(r"^struct (\w+) {", text, flags=re.MULTILINE)) == set(STRUCTS)
    for name, args in STRUCTS.items():
        body = re.search(rf"struct {name} {{(.*?)}};", text, flags=re.DOTALL)[1]
        fields = re.findall(r"\buint(?:32|64)_t (\w+)(?:\[\d\])?;", body)
        assert len(fields) == body.count(";"), f"{name}: fixed-width fields only"
        assert fields == list(dict.fromkeys(c.split("[")[0] for c in c_fields(args).values()))


def test_header_compiles_alone_and_twice(build, tmp_path):
    """It needs no other header before it, and may be included by two headers of a program."""
    command = BUILDS[build]
    needs(*command)
    source = tmp_path / "twice.c"
    source.write_text(f'#include "{HEADER}"\n#include "{HEADER}"\nint main(void) {{ return 0; }}\n')
    subprocess.run([*command, *STRICT, "-fsyntax-only", source], check=True)
