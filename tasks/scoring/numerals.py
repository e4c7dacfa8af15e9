"""Numbers in predictions, as benchmarks read them."""

import re


def first_number(text: str) -> str | None:
    """The first number, a decimal one whole; None if there is none."""
    match = re.search(r"-?\d+(?:\.\d+)?", text)
    return match[0] if match else None


def first_digits(text: str) -> str | None:
    """The first run of digits."""
    match = re.search(r"\d+", text)
    return match[0] if match else None


def same_number(number: str, reference: str) -> bool:
    """Whether a number equals the reference; of a whole-number reference only the whole part is compared."""
    try:
        value, wanted = float(number), float(reference)
    except ValueError:
        return False
    return int(value) == int(wanted) if re.fullmatch(r"-?\d+", reference.strip()) else value == wanted
