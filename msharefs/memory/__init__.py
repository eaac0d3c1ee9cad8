"""Where a region *lives*: its backing file, the mount's memory limit, the objects one may map.

Knows page ranges and descriptors; knows neither FUSE nor client processes.
"""
