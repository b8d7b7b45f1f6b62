"""The Python API, ``hvdlm.train`` and ``hvdlm.load``, which ``hvdlm`` imports when they are used.

Under a launcher every rank calls, and gets the same result. Watchdog and signal handlers are there during a call only;
the transport stays open between calls, since most can be started once in a process.
"""

import importlib
import signal

# Threads of numpy's BLAS, which its import starts, would take the SIGCONT by which mpirun gives notice of its end, and
# for which ``hvdlm.training.signals`` waits: they keep the mask that is set here.
_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})
try:
    importlib.import_module("numpy")
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask)
