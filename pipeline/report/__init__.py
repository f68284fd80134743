"""What a run found: table, page, charts, leaderboard entries, wandb report."""
