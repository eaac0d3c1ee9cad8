"""The rules in action: the namespace, the ioctls, the control files, the life of the mount.

Translates between ``fuse/``, ``region/``, ``memory/`` and ``clients/``; each of these stands
alone.
"""
