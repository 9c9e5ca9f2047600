"""Starting runs elsewhere: job scripts, and what a machine with a GPU and no network needs."""
