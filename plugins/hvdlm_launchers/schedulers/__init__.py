"""Job files for Slurm, PBS, LSF and Kubernetes, and the shell code that they share."""
