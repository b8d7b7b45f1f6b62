"""A self-contained HTML page about one run or several (``python -m hvdlm report``)."""
