"""Stores beyond the rectangular one: packed codes, and heads that keep different numbers of slots."""
