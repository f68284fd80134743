"""SLURM jobs, and what runs on their nodes."""
