"""Numbers in predictions, as benchmarks read them."""

import re


def first_number(text: str) -> str | None:
    """The first number, a decimal one whole; None if there is none."""
    found = re.search(r"-?\d+(?:\.\d+)?", text)
    return found[0] if found else None


def first_digits(text: str) -> str | None:
    """The first run of digits."""
    found = re.search(r"\d+", text)
    return found[0] if found else None


def same_number(found: str, reference: str) -> bool:
    """Whether a number equals the reference; of a whole-number reference only the whole part is compared."""
    try:
        value, wanted = float(found), float(reference)
    except ValueError:
        return False
    return int(value) == int(wanted) if re.fullmatch(r"-?\d+", reference.strip()) else value == wanted
