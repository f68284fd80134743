"""Ray clusters that leave no process and no file behind."""
