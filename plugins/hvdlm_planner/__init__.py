"""The planner: predicted memory, traffic and seconds of a run, measurements of this machine, hardware files."""
