"""The Python API, ``hvdlm.train`` and ``hvdlm.load``, which ``hvdlm`` imports when they are used.

Under a launcher every rank calls, and gets the same result. Watchdog and signal handlers are there during a call only;
the transport stays open between calls, since most can be started once in a process.
"""
