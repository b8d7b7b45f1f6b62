"""Builds Horovod for the active Python, frameworks and MPI, and checks an installed one.

Uses only the standard library, since it runs before anything is installed.
"""
