"""What a run leaves on disk and in wandb: run directory, leases, checkpoints, metrics, provenance."""
