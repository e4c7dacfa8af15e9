"""Forms of keys and values in fewer bits, in whole bytes; `segments` holds what they make."""
