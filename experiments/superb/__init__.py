"""``interstack superb``: any encoder on SUPERB's tasks."""
