"""fio's mmap engine writes at random through mappings, and verifies every block."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    "way",
    [
        ("--rw=randwrite", "--bs=4k"),
        ("--rw=write", "--bs=64k", "--fallocate=none"),
        ("--rw=randrw", "--bsrange=512-32k", "--bs_unaligned"),
    ],
    ids=["random", "growing", "unaligned"],
)
def test_what_mappings_wrote_is_there(automap, program, run, way):
    output = run(
        program("fio"),
        "--name=job",
        "--ioengine=mmap",
        f"--directory={automap.path}",
        "--size=8M",
        "--numjobs=2",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--output-format=json",
        *way,
        cwd=automap.path.parent,
    )
    report = json.loads(output[output.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0, 0]
    assert all(job["write"]["total_ios"] > 0 for job in report["jobs"])
    assert all(job["read"]["total_ios"] > 0 for job in report["jobs"]), "it verified"


def test_calls_and_mappings_of_one_file_agree(automap, program, run):
    for engine in ("psync", "mmap", "pvsync"):
        run(
            program("fio"),
            "--name=job",
            f"--filename={automap.path}/one",
            f"--ioengine={engine}",
            "--rw=randwrite",
            "--bs=4k",
            "--size=4M",
            "--verify=md5",
            "--verify_fatal=1",
            cwd=automap.path.parent,
        )
        # and what this engine wrote, as another one reads it
        run(
            program("fio"),
            "--name=job",
            f"--filename={automap.path}/one",
            f"--ioengine={'mmap' if engine != 'mmap' else 'sync'}",
            "--rw=randread",
            "--bs=4k",
            "--size=4M",
            "--verify=md5",
            "--verify_fatal=1",
            "--verify_only=1",
            cwd=automap.path.parent,
        )
