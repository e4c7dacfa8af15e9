"""Errors that a user can cause, and the one that a method causes by holding too much."""


class UserError(ValueError):
    """Something the user typed or supplied cannot work; the message says what was given and what would."""


class NotHere(UserError):
    """A method or budget that cannot work with these settings; the other cells of a sweep go on without it."""


class BudgetMiss(RuntimeError):
    """A cache holds more than its budget and its documented overhead allow.

    asked, measured: bytes at the end of the prompt.  full: those of the full cache.
    """

    def __init__(self, method: str, asked: int, measured: int, full: int):
        super().__init__(
            f"{method}: {measured:,} bytes are held at the end of the prompt, {measured / full:.1%} of the full "
            f"cache's; {asked:,} were asked for, {asked / full:.1%}"
        )
        self.asked, self.measured = asked, measured
