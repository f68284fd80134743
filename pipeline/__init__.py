"""HYDRA's phases as one training loop: robust pretraining, score pruning, finetuning, evaluation.

This package knows nothing of SLURM or of the command line; `launch` calls `pipeline.training.driver`.
"""
