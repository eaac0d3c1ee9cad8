"""A PostgreSQL cluster of the tests' own: made, started, asked, killed and stopped."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

USER = "postgres"
PATIENCE = 60

SETTINGS = {
    "listen_addresses": "''",
    "dynamic_shared_memory_type": "mmap",
    "shared_buffers": "16MB",
    "max_connections": "20",
    "fsync": "off",
    "max_worker_processes": "8",
    "max_parallel_workers": "8",
    "max_parallel_workers_per_gather": "3",
    "parallel_setup_cost": "0",
    "parallel_tuple_cost": "0",
    "min_parallel_table_scan_size": "0",
    "restart_after_crash": "on",
    "autovacuum": "off",
}
"""Every query that can be is run in parallel, and its workers meet in dynamic shared memory."""


@attrs.define
class Cluster:
    """A cluster in ``data``; ``tools`` finds PostgreSQL's programs. Everything runs as postgres."""

    data: Path
    tools: Callable[[str], str]

    def make(self, **settings: str) -> None:
        """Settings are added to, or replace, those above."""
        owner = pwd.getpwnam(USER)
        self.data.mkdir(mode=0o700, exist_ok=True)
        os.chown(self.data, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-D", self.data, "-A", "trust", "--no-sync", "--no-instructions")
        lines = [f"{key} = {value}\n" for key, value in {**SETTINGS, **settings}.items()]
        lines.append(f"unix_socket_directories = '{self.data}'\n")
        with (self.data / "postgresql.auto.conf").open("a") as file:
            file.writelines(lines)

    def move_dynamic_memory(self, place: Path) -> None:
        """Have ``pg_dynshmem`` lie elsewhere, before the cluster is started."""
        owner = pwd.getpwnam(USER)
        place.mkdir(mode=0o700)
        os.chown(place, owner.pw_uid, owner.pw_gid)
        inside = self.data / "pg_dynshmem"
        if inside.is_symlink():
            inside.unlink()
        else:
            shutil.rmtree(inside)
        inside.symlink_to(place)

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-D", self.data, "-l", self.data / "server.log")

    def stop(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", self.data)

    def ask(self, query: str) -> str:
        """What the query returns, as psql prints it unadorned."""
        return self._run("psql", "-h", self.data, "-XAtq", "-c", query, "postgres").strip()

    def pgbench(self, *arguments: str) -> str:
        return self._run("pgbench", "-h", self.data, *arguments, "postgres")

    def asking(self, query: str) -> subprocess.Popen[str]:
        """As :meth:`ask`, not waited for."""
        return subprocess.Popen(
            [self.tools("psql"), "-h", str(self.data), "-XAtq", "-c", query, "postgres"],
            user=USER,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        return (self.data / "server.log").read_text(errors="replace")

    def _run(self, name: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [self.tools(name), *map(str, arguments)],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout
