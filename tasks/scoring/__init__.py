"""How answers are scored: pure functions of strings, and remarks on what was scored."""
