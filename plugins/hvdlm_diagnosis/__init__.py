"""Explains from flight recorders why a run hung or died: which ranks wait for which, and where."""
