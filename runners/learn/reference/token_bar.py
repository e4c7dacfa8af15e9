"""Progress of a training run, counted in tokens."""


class TokenBar:
    """A bar of tokens with the time left; plain lines every 50 steps where there is no terminal."""

    def __init__(self, total: int, done: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar, self.calls = Progress(*columns), 0
        self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def advance(self, tokens: int, note: str) -> None:
        """So many tokens more; note: said behind the bar."""
        self.calls += 1
        self.bar.update(self.task, advance=tokens, note=note)
        if not self.bar.console.is_terminal and self.calls % 50 == 0:
            task = self.bar.tasks[0]
            left = task.time_remaining
            print(f"{task.completed:,.0f} of {task.total:,.0f} tokens, {left or 0:,.0f} s left, {note}", flush=True)
