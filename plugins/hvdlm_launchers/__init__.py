"""Cluster jobs that train a model (``launch``), and restarts of a run that fails (``supervise``)."""
