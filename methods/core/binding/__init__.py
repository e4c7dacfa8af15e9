"""How a model is bound: its decoder, rotations, masks, passes, and a trial on a small copy of it."""
