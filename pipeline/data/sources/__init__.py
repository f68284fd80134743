"""Readers of data sets as their authors distribute them, one per format."""
