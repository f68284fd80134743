"""Honesty checks: symptoms of an overestimated robust accuracy."""
