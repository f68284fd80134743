"""What a run leaves on disk and in wandb: directory, leases, checkpoints, metrics."""
