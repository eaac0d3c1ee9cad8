SLOW: int
GONE: int
STUCK: int

def borrow_many(
    jobs: bytearray, calls: bytearray, threads: int, limit_ns: int, own_device: int, /
) -> None: ...
