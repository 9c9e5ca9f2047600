"""``interstack reproduce``: a study file becomes jobs, jobs are run once, their results become a report."""
