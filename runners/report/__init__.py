"""What a run prints, draws and sends: tables, pictures, runs of Weights & Biases."""
