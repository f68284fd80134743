"""SLURM: submitting jobs, and the processes on their nodes."""
