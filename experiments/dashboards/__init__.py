"""Dashboards as code: one plain specification, from which a W&B workspace view and a W&B report are built."""
