"""The commands: ``mshare`` (a file each) and ``msharefs``, the server that it starts.

What a user types and reads is decided here, what it does in :mod:`msharefs.client` and
``service/``. A command imports what it needs when it runs, so that ``mshare query`` in a shell
loop does not pay for the server's event loop.
"""
