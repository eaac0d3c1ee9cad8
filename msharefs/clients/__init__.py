"""Who maps a region: the processes on the other side.

So far the census, which finds them and what they have mapped. Knows neither FUSE nor memory.
"""
