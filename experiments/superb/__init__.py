"""``interstack superb``: score any encoder on SUPERB's tasks."""
