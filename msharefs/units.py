"""How people write sizes (``64M``, ``0x1000``), call errors (``EBUSY``), and read odd names."""

from __future__ import annotations

import errno
import re
from typing import Final

_UNITS: Final = "KMGTPE"
_SIZE: Final = re.compile(r"(0x[0-9a-f]+|[0-9]+)(?:([kmgtpe])(?:i?b)?)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes, with powers of 1024. Raises ValueError for anything else than a size.

    >>> parse_size("64M"), parse_size("4KiB"), parse_size("0x1000"), parse_size("512")
    (67108864, 4096, 4096, 512)
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"not a size: {text!r} (write it as 64M, 2G, 4096 or 0x1000)")
    number, unit = found.groups()
    factor = 1024 ** (_UNITS.index(unit.upper()) + 1) if unit else 1
    return int(number, 16 if number[:2].lower() == "0x" else 10) * factor


def format_size(size: int) -> str:
    """For people: at most one decimal, as ls(1) and lsipc(1) print sizes.

    >>> [format_size(n) for n in (0, 512, 4096, 1536, 67108864)]
    ['0B', '512B', '4K', '1.5K', '64M']
    """
    value, unit = float(size), "B"
    for larger in _UNITS:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    text = f"{value:.1f}".removesuffix(".0")
    return text + unit


def one_line(text: str) -> str:
    r"""What a terminal may be given: a file name can hold anything, escape sequences too.

    >>> print(one_line("a b"), one_line("a\nb\x1b[0m"))
    a b a\nb\x1b[0m
    """
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def errno_name(code: int) -> str:
    """The name of an errno; of its two names for 95, the one that ioctl's manual pages use.

    >>> errno_name(16), errno_name(95), errno_name(9999)
    ('EBUSY', 'EOPNOTSUPP', 'errno 9999')
    """
    if code == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"
    return errno.errorcode.get(code, f"errno {code}")
