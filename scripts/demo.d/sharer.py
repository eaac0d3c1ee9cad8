"""A program that knows nothing of msharefs: maps a file and answers about its bytes, by line."""

import hashlib
import mmap
import os
import sys

fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, int(sys.argv[2]))
for line in sys.stdin:
    what, number = line.split()
    if what == "sum":
        with memoryview(memory)[: int(number)] as part:
            print(hashlib.sha256(part).hexdigest())
    else:
        print(memory[int(number)])
