"""The tasks translation, speech and digits, and their models in both frameworks."""
