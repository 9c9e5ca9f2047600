"""Values that s3prl's own code computes for inputs made from formulas, which our tests are held against.

``python -m experiments.superb.reference S3PRL_SOURCE tests/data/s3prl_reference.npz`` writes them, in an environment
with s3prl's dependencies (docs/superb.md). Only :mod:`.inputs` is used outside of it.
"""
