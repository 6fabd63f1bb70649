"""The evidence of docs/results.md: runs, their records, and the tables made of them."""
