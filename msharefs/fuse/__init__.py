"""How the kernel talks to us: mounting, request frames, the router, passthrough.

Knows nothing of regions: it takes `Handlers`. pyfuse3 serves the namespace behind the router.
"""

from __future__ import annotations

from .handlers import FORWARD, Forward, Handlers, IoctlReply, OpenedFile, OpenPlan
from .wire import BadFrame, FallocateRequest, IoctlRequest, Opcode, ReadRequest

__all__ = [
    "FORWARD",
    "BadFrame",
    "FallocateRequest",
    "Forward",
    "Handlers",
    "IoctlReply",
    "IoctlRequest",
    "Opcode",
    "OpenPlan",
    "OpenedFile",
    "ReadRequest",
]
