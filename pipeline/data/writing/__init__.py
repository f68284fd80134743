"""Atomic, verified writing of FFCV files in a supervised process."""
