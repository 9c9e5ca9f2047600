"""Commands that take a student to a device: export, latency, streaming."""
