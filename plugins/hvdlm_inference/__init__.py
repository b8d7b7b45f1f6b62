"""Trained runs in use: text from their models, and the commands ``evaluate`` and ``generate``."""
