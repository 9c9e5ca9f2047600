"""Benchmarks whose numbers are published: what a growth costs."""
