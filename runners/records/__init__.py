"""Records: what is written of a cell, by which code, who writes it, and what is there already."""
