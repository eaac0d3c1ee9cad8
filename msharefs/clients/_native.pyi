SLOW: int
GONE: int
STUCK: int
PENDING: int

def borrow_many(
    jobs: bytearray,
    calls: bytes | bytearray,
    texts: bytes,
    threads: int,
    limit_ns: int,
    own_device: int,
    told: int,
    /,
) -> None: ...
def expected(tid: int, /) -> tuple[int, int]: ...
def carry_out_many(counter: bytearray, errands: bytearray, calls: bytearray, /) -> None: ...
def look_at_many(whom: bytes, proc: int, major: int, minor: int, /) -> list[bytes | int]: ...
