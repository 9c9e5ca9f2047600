"""The corpora of SUPERB's tasks in their published layouts, and the batches of s3prl's recipes."""
