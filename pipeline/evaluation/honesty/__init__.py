"""Honesty checks: reasons to doubt a robust accuracy."""
