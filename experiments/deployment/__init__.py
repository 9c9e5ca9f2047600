"""What an encoder costs where it is used: MACs by formula, and latency and memory as measured on a small machine."""
