"""The tests that ``--hvdlm-plugin`` adds to a run of pytest."""
