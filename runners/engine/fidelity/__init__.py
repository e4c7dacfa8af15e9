"""The forced half of the fidelity panel: what two caches predict on the full cache's own answer."""
