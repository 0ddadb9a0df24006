"""Compare runs: which of them may share a table, their statistics, and the tables."""
