"""What an experiment is: the typed recipe, its stages and schedules. Imports no torch."""
