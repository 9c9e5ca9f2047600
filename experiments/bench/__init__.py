"""Benchmarks whose numbers are published, through the code path that trains: a step, a growth."""
