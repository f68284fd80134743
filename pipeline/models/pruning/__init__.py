"""Scores and masks: how many connections are kept, and which."""
