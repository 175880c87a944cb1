"""One model over several machines: each has a share of the layers, and passes hop along."""
