"""Shared-memory regions as files: the kernel's proposed *msharefs*, usable today through FUSE.

Programs use :mod:`msharefs.client`; everybody else uses the ``mshare`` command, or plain
``open``/``mmap``/``ioctl`` with ``msharefs/include/msharefs.h``.
"""

__version__ = "0.1.0"
