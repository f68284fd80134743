"""Exact batches from FFCV files: sample order, crops, decoding."""
