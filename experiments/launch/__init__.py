"""Start runs elsewhere: job scripts, and a bundle for a machine with a GPU and no network."""
