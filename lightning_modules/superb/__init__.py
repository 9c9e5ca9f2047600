"""SUPERB: frozen upstreams, featurizer, heads, losses and metrics of its tasks, as s3prl defines them."""
