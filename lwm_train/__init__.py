"""Train, evaluate and sample Large World Models from packed shards, in JAX with ring attention."""
