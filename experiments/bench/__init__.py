"""Benchmarks of the training code path, whose numbers are published: a step, a growth."""
