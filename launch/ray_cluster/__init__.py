"""Ray clusters that leave nothing behind."""
