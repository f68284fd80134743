"""Images: reading sources, writing and checking FFCV files, loading them in an exact order."""
