"""Metrics of a stage: `metrics.jsonl`, mirrored to wandb."""
