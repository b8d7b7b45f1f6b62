"""Builds Horovod for the Python, the frameworks and the MPI at hand, and says what an installed one can do.

Only the standard library is used: this runs before anything is installed.
"""
