"""The search for tables of bits per layer."""
