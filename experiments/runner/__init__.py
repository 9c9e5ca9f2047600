"""``interstack reproduce``: turn a study file into jobs, run each job once, and report the results."""
