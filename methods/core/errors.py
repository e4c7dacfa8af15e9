"""Errors that a user can cause, and the one that a method causes by holding too much."""


class UserError(ValueError):
    """Something the user typed or supplied cannot work; the message says what was given and what would."""


class NotHere(UserError):
    """A method or budget that cannot work with these settings; the other cells of a sweep go on without it."""


class BudgetMiss(RuntimeError):
    """A cache holds more than its budget and its documented overhead allow, or reads more.

    asked, measured: bytes held at the end of the prompt, or, where the budget binds them, read by a step.  full: those
    of the full cache.
    """

    def __init__(self, method: str, asked: int, measured: int, full: int, binds: str = "held"):
        when = "held at the end of the prompt" if binds == "held" else "read by a step"
        super().__init__(
            f"{method}: {measured:,} bytes are {when}, {measured / full:.1%} of the full cache's; {asked:,} were asked "
            f"for, {asked / full:.1%}"
        )
        self.asked, self.measured = asked, measured
