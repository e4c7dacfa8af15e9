"""The reference model: its training, and the card that says what it can do."""
