"""Use of a student after its training."""
