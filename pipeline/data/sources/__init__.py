"""Readers of the authors' files, one per format."""
