"""Checks of a machine, and of a recipe's files on it, before a long run: `python -m launch doctor`."""
