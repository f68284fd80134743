"""Writes FFCV files in a supervised process; atomic and verified."""
