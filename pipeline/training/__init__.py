"""One loop for every stage, and the processes that it runs in."""
