"""Metrics of a stage: `metrics.jsonl`, and wandb as its mirror."""
