"""What the meter writes down: moments of a sequence, reads of its passes, and the ledger that is made of them."""
