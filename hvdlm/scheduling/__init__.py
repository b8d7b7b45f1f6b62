"""Writes job files: one description of a job, one writer per scheduler (``python -m hvdlm launch``)."""
