"""Floor 1: where work runs — in this process, on a local Ray, or on the cluster at RAY_ADDRESS."""
