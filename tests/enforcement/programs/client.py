"""The program of client.c in Python, with its mmap module. Dies of its first SIGSEGV, having told where."""

import ctypes
import mmap
import os
import signal
import sys

libc = ctypes.CDLL(None)


class Action(ctypes.Structure):
    """struct sigaction of <signal.h>."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def on_fault(_number, info, _context):
    address = ctypes.c_uint64.from_address(info + 16).value
    os.write(1, b"segv %x\n" % address)
    libc.signal(signal.SIGSEGV, None)  # SIG_DFL; the access is made again, and is the end


on_fault_c = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(on_fault)
SA_SIGINFO = 4
action = Action(ctypes.cast(on_fault_c, ctypes.c_void_p).value, flags=SA_SIGINFO)


def serve(memory=None):
    while line := os_readline():
        words = line.split()
        what, arguments = words[0], words[1:]
        try:
            if what == "map":
                path, mode, offset, length, prot = arguments
                fd = os.open(path, os.O_RDWR if mode == "rw" else os.O_RDONLY)
                try:
                    memory = mmap.mmap(
                        fd, int(length), mmap.MAP_SHARED, int(prot), offset=int(offset)
                    )
                finally:
                    os.close(fd)
                say("mapped")
            elif what == "load":
                say(f"value {memory[int(arguments[0])]}")
            elif what == "store":
                memory[int(arguments[0])] = int(arguments[1])
                say("stored 0")
            elif what == "in":
                with open(arguments[1], "rb", buffering=0) as file:
                    at = int(arguments[0])
                    say(f"count {file.readinto(memoryview(memory)[at : at + 1])}")
            elif what == "out":
                with open(arguments[1], "wb", buffering=0) as file:
                    at = int(arguments[0])
                    say(f"count {file.write(memoryview(memory)[at : at + 1])}")
            elif what == "unmap":
                memory.close()
                say("result 0")
            elif what == "fork":
                if pid := os.fork():
                    say(f"pid {pid}")
                else:
                    os.dup2(os.open(arguments[0], os.O_RDONLY), 0)
                    os.dup2(os.open(arguments[1], os.O_WRONLY), 1)
        except OSError as error:
            say(f"errno {error.errno}")


def say(text):
    os.write(1, text.encode() + b"\n")


def os_readline():
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit()
        line += byte
    return line.decode()


libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
libc.sigaction(signal.SIGSEGV, ctypes.byref(action), None)
say(f"ready {os.getpid()}")
serve()
