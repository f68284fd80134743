"""Attacks, certified bounds and robust training objectives."""
