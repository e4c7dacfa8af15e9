"""The commands of analysis, each a module with a `main`, and what several of them take, declared once.

`python -m analysis COMMAND ...` and `python -m analysis.COMMAND ...` are the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from analysis import screen
from analysis.files import CannotWrite, given_path
from analysis.load import NothingToRead

_ALL = ("frontier", "report", "compare", "leaderboard", "audit", "heads", "tables")
#: those that are here: what writes the repository's own pages is part of no wheel
NAMES = tuple(
    name for name in _ALL if any((Path(__file__).parent / at).is_file() for at in (f"{name}.py", f"{name}/__main__.py"))
)
RESULTS = Path("results")


@dataclass(frozen=True)
class Command:
    """One command.

    about: its module's docstring, whose first line is shown.  run: from the parsed options to the exit code; it may
    raise NothingToRead and CannotWrite, and call `given.refuse` with what is wrong with the options together.
    options: adds those that are its own, before or after the shared ones.
    results: what the positional RESULTS is for, "" where there is none.  needed: it must be given.  default: it is
    RESULTS below the working folder where it is not.
    out: what --out is, "" where there is none.  markdown: it prints a table that --markdown gives to paste.
    """

    name: str
    about: str
    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None]
    results: str = ""
    needed: bool = False
    default: Path | None = None
    out: str = ""
    markdown: bool = False

    def main(self, arguments: list[str] | None = None) -> int:
        """Parse and run; the exit code: 2, with one line, where there is nothing to read or no place to write."""
        screen.any_text()
        first_line = self.about.split("\n")[0]
        parser = argparse.ArgumentParser(prog=f"python -m {__package__}.{self.name}", description=first_line)
        if self.results:
            nargs = None if self.needed else "?"
            parser.add_argument("results", type=given_path, nargs=nargs, default=self.default, help=self.results)
        self.options(parser)
        if self.out:
            parser.add_argument("--out", type=given_path, help=self.out)
        if self.markdown:
            parser.add_argument("--markdown", action="store_true", help="to paste, whatever the screen's width")
        parser.add_argument(
            "--all-generations", action="store_true", help="also what older code and files have recorded"
        )
        parser.set_defaults(refuse=parser.error)
        try:
            return self.run(parser.parse_args(arguments))
        except (NothingToRead, CannotWrite) as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 2


def main(arguments: list[str] | None = None) -> int:
    """`python -m analysis COMMAND ...`: run a command; the exit code is its own."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in NAMES:
        code: int = importlib.import_module(f".{words[0]}", __package__).main(words[1:])
        return code
    if words and words[0] in ("-h", "--help"):
        print(f"usage: python -m {__package__} COMMAND ...\n")
        for name in NAMES:
            about = importlib.import_module(f".{name}", __package__).__doc__ or ""
            print(f"  {name:12} {about.partition(chr(10))[0]}")
        print("\nCOMMAND --help says what each takes")
        return 0
    what = f"no command {words[0]}" if words else "no command is given"
    print(f"analysis: {what}; give one of {', '.join(NAMES)}, or --help", file=sys.stderr)
    return 2
