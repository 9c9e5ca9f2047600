"""How long a test waits for something that must come."""

# Seconds: a guard against a hang, not a measure of speed, so that no test fails where a machine is slow or busy. Less
# than the 1800 after which torch.distributed gives up on a lost rank by itself.
PATIENCE = 1200
