"""Evaluation of trained networks: clean and robust accuracy, with confidence intervals and honesty checks."""
