"""Studies: a YAML file becomes jobs, jobs are run once, their results become a report. The YAML files lie here."""
