"""The planner's measurements of this machine, and the files that describe others."""
