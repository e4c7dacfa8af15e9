"""LongBench: its subsets, prompts and scores."""
