"""What the ops cost on the machine at hand, as a share of what the machine can do: `python -m kernels.bench`."""
