"""Runners: the loops that bring a model, a method and a task together, and what they measure and record."""
