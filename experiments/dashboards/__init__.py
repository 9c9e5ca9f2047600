"""Dashboards as code: a W&B workspace view and a W&B report are built from one plain specification."""
