"""How a student grows: which layers are copied (policies), and when (schedules). Pure functions."""
