"""The corpora of SUPERB's tasks in their published layouts, and the batches that s3prl's recipes draw from them."""
