"""The command line and where runs are started. Training itself is `pipeline`'s."""
