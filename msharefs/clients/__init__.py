"""Who maps a region: the processes on the other side.

The census finds them, the roster knows them, an address space tells what one of them has mapped,
and the replica what it has to change. Knows neither FUSE nor memory.
"""
