"""The command line, and the launchers: this machine or SLURM. Training itself is in `pipeline`."""
