"""Telling the service manager how we are: sd_notify(3).

Written out here because it is one datagram; the libraries for it bring either a build against
libsystemd or no way to pass descriptors. Without ``NOTIFY_SOCKET`` nothing happens.
"""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(**state: str) -> None:
    """Send e.g. ``READY="1", STATUS="serving"``. A manager that does not listen is no error."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # abstract socket
    message = "\n".join(f"{key}={value}" for key, value in state.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        log.warning("telling the service manager %s: %s, ignoring", sorted(state), error)
