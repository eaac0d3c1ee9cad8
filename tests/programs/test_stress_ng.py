"""stress-ng's stressors of files, locks and mappings, all of a kind at once, verifying."""

from __future__ import annotations

import re

import pytest

SECONDS = 7

STRESSORS = {
    "names": "chmod dentry dir mknod open rename touch utime",
    "files": "copy-file fcntl fstat hdd io revio seek sendfile",
    "sizes": "fallocate fpunch fsize sync-file",
    "locks": "flock locka lockf lockofd lease",
    "mappings": "aio fault iomix madvise mmap msync",
    "processes": "msyncmany rmap",
}
"""Those of its filesystem, os and memory classes that work on files at --temp-path. Left out: what
FUSE has not (fiemap, xattr), and link, symlink and filename, whose first round takes too long."""

SIZES = {
    "copy-file": ["--copy-file-bytes", "128M"],
    "fallocate": ["--fallocate-bytes", "16M"],
    "hdd": ["--hdd-bytes", "16M"],
    "iomix": ["--iomix-bytes", "16M"],
    "mmap": ["--mmap-file", "--mmap-bytes", "8M"],
    "msync": ["--msync-bytes", "4M"],
    "seek": ["--seek-size", "4M"],
    "sync-file": ["--sync-file-bytes", "4M"],
}
"""So that all of a kind fit into the mount together, and each gets something done in time."""


@pytest.mark.parametrize("kind", STRESSORS)
def test_stressors_find_no_fault(start_mount, program, run, kind):
    # Some of them map privately, as they may on tmpfs.
    automap = start_mount("automap,size=1G,private=allow")
    scratch = automap.path / "scratch"
    scratch.mkdir()
    names = STRESSORS[kind].split()
    words = [word for name in names for word in (f"--{name}", "1", *SIZES.get(name, []))]
    ending = ["--timeout", f"{SECONDS}s", "--temp-path", scratch, "--verify", "--metrics"]
    output = run(program("stress-ng"), *words, *ending, cwd=automap.path.parent)
    assert "successful run completed" in output, output
    assert not re.search(r"\bfail:|\berror:", output), output
    done = {name: re.search(rf"\] {name} +(\d+)", output) for name in names}
    idle = [name for name, found in done.items() if not found or found[1] == "0"]
    assert not idle, f"{idle} did nothing:\n{output}"
    assert not list(scratch.iterdir()), "they clean up after themselves"
