"""Reports of runs: text table, HTML page, charts, leaderboard entries, wandb report."""
