"""A country profile as text, and what can be asked of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST_LINE = 420  # characters; longer entries are lists of parties, treaties and the like

# the entries, and of those with several parts the part, that are asked for; none is easily taken for another
ASKED = (
    ("Geography", "Area", "total"),
    ("Geography", "Coastline"),
    ("Geography", "Elevation extremes", "highest point"),
    ("Geography", "Natural resources"),
    ("Geography", "Irrigated land"),
    ("Geography", "Total renewable water resources"),
    ("People and Society", "Population"),
    ("People and Society", "Median age", "total"),
    ("People and Society", "Net migration rate"),
    ("People and Society", "Major urban areas - population"),
    ("People and Society", "Total fertility rate"),
    ("People and Society", "HIV/AIDS - people living with HIV/AIDS"),
    ("People and Society", "Obesity - adult prevalence rate"),
    ("Government", "Independence"),
    ("Government", "Executive branch", "chief of state"),
    ("Government", "National anthem", "lyrics/music"),
    ("Economy", "Agriculture - products"),
    ("Economy", "Industries"),
    ("Economy", "Labor force"),
    ("Economy", "Population below poverty line"),
    ("Economy", "Taxes and other revenues"),
    ("Economy", "Exports - partners"),
    ("Economy", "Exports - commodities"),
    ("Energy", "Electricity - installed generating capacity"),
    ("Energy", "Carbon dioxide emissions from consumption of energy"),
    ("Communications", "Telephones - mobile cellular", "total"),
    ("Communications", "Internet users", "total"),
    ("Transportation", "Railways", "total"),
    ("Transportation", "Roadways", "total"),
    ("Transportation", "Waterways"),
    ("Transportation", "Ports and terminals", "major seaport(s)"),
)
FIGURE = re.compile(r"-?\$?(-?\d[\d,]*(?:\.\d+)?)(?![\d.,]*\d| [A-Z])")
NAME = re.compile(r"\d{1,2} [A-Z][a-z]+ \d{4}|[^\W\d_][^;,(\[/:\d]{3,32}(?=[;,(\[/\d]|$)")

Line = tuple[tuple[str, str], str]  # section and entry; the text


@dataclass(frozen=True)
class Fact:
    """A figure or a name of a profile. line: the place of its line.  path: the entry, and its part."""

    line: int
    path: tuple[str, ...]
    answer: str

    @property
    def label(self) -> str:
        """What it is called."""
        return ": ".join(self.path[1:])


def lines_of(profile: Mapping[str, Any]) -> list[Line]:
    """The entries of a profile of at most LONGEST_LINE characters, each a line, by section and name."""
    found = []
    for section, entries in profile.items():
        for name, entry in entries.items():
            text = _text(entry)
            if text and len(text) <= LONGEST_LINE and section != "Introduction":
                found.append(((section, name), f"{name}: {text}"))
    return found


def facts_of(profile: Mapping[str, Any]) -> Iterator[Fact]:
    """What can be asked: figures of two digits or more, and names, that only one line of the profile holds."""
    lines = lines_of(profile)
    for place, ((section, name), line) in enumerate(lines):
        for path in ASKED:
            if path[:2] != (section, name):
                continue
            entry = profile[section][name]
            answer = _answer(clean(entry.get("text") if len(path) == 2 else entry.get(path[2], {}).get("text")))
            if answer and line.count(answer) == 1 == sum(answer.lower() in one.lower() for _, one in lines):
                yield Fact(place, path, answer)


def _answer(text: str) -> str:
    """The figure or the name that a value begins with; empty if it is short enough to be guessed, or no name."""
    figure, name = FIGURE.match(text), NAME.match(text)
    if figure:
        return figure[1] if sum(map(str.isdigit, figure[1])) >= 2 else ""
    return name[0].strip() if name and len(name[0].split()) <= 5 and not name[0].strip().isupper() else ""


def size(text: str) -> int:
    """About how many tokens a text has: digits, words and marks; of a profile within a tenth of SmolLM2's count."""
    return len(re.findall(r"\d|[^\W\d_]{1,9}|[^\w\s]", text))


def prose_of(profile: Mapping[str, Any], section: str, name: str) -> str:
    """A text of a profile on one line, empty where it has none."""
    entry = profile.get(section, {}).get(name, {})
    return clean(entry.get("text")) if isinstance(entry, dict) else ""


def sentences(text: str) -> list[str]:
    """Cut behind full stops that a capital follows, outside initials."""
    return [part.strip() for part in re.split(r"(?<=[a-z0-9)%][.!?])\s+(?=[A-Z])", text) if part.strip()]


def clean(text: str | None) -> str:
    """On one line, with commas between what were lines; empty where a character was lost."""
    if not text or "\ufffd" in text:
        return ""
    return "; ".join(" ".join(part.split()) for part in text.split("++") if part.strip())


def _text(entry: Any) -> str:
    """An entry and its parts in one line."""
    if not isinstance(entry, dict):
        return ""
    parts = [clean(entry.get("text"))]
    parts += [f"{name} {_text(part)}" for name, part in entry.items() if name != "text" and _text(part)]
    return "; ".join(part for part in parts if part)
