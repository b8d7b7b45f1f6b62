"""A training run: preflight checks, the loop, and the run folder."""
