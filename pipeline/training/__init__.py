"""The training loop of every stage, and the processes that it runs in."""
