"""Counting what a finished network gets right, clean and attacked, and how sure the counts are."""
