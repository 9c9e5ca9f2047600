"""Runs as folders: their files, loggers, costs, and how they are read."""
