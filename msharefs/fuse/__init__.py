"""How the kernel talks to us: mounting, request frames, the router, passthrough.

Knows nothing of regions: it takes `Handlers`. pyfuse3 serves the namespace behind the router.
"""

from __future__ import annotations

from .decode import BadFrame
from .handlers import FORWARD, Forward, Handlers, IoctlReply, OpenedFile, OpenPlan
from .handshake import Connection
from .mount import FSTYPE, Mount, MountError, MountOptions, find_mounts, mount, mount_at, unmount
from .router import Router
from .session import Session, serve
from .wire import (
    FallocateRequest,
    GetxattrRequest,
    IoctlRequest,
    Opcode,
    ReadRequest,
    WriteRequest,
)

__all__ = [
    "FORWARD",
    "FSTYPE",
    "BadFrame",
    "Connection",
    "FallocateRequest",
    "Forward",
    "GetxattrRequest",
    "Handlers",
    "IoctlReply",
    "IoctlRequest",
    "Mount",
    "MountError",
    "MountOptions",
    "Opcode",
    "OpenPlan",
    "OpenedFile",
    "ReadRequest",
    "Router",
    "Session",
    "WriteRequest",
    "find_mounts",
    "mount",
    "mount_at",
    "serve",
    "unmount",
]
