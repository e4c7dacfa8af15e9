"""longbench-real: subsets of real text, one per LongBench category, in LongBench's record format.

The shapes follow LongBench; texts and prompts are not the benchmark's.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tasks.bundles import write_rows
from tasks.real import code
from tasks.real import profile as country
from tasks.real.sources import Sources

# by seed, the samples that the model answers without the text
KNOWN = Path(__file__).with_name("known.json")

TITLE = "Country profile of"
NO_TEXT = "-"
LONGEST_PROFILE = 420  # tokens, about, of a sample of profile_qa
PROFILES = 4  # of a sample of profiles_qa
# as in LongBench the task is said before the text and again behind it
PROFILE_PROMPT = (
    "Read this part of a country profile, and answer the question that stands behind it.\n\n"
    "{context}\n\n"
    "The text above is a part of a country profile, with one entry on each line. Find the entry that is named below, "
    "and write the figure or the name that stands there, without any other words.\n\n"
    "{input}"
)

Name = tuple[str, str]
Drawn = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Subset:
    """draw: endless or long, from the sources and a generator of numbers; a sample is context, input, answers.

    shipped: the full cache of SmolLM2-135M was measured far enough above chance, or above its score without the text;
        others are candidates, which are written to be measured only.
    """

    draw: Callable[[Sources, np.random.Generator], Drawn]
    category: str
    metric: str
    max_new_tokens: int
    prompt: str
    count: int
    plain: bool = True
    first_line: bool = False
    default: bool = False
    shipped: bool = False


def profile_qa(sources: Sources, rng: np.random.Generator) -> Drawn:
    """A figure or a name out of consecutive lines of one profile."""
    for name, fact in asked(sources, rng):
        context = excerpt(name, country.lines_of(sources.profiles[name]), fact.line, (285, 345), rng)
        if country.size(context) <= LONGEST_PROFILE:
            yield {
                "context": context,
                "input": f"From the profile of {name[1]} above:\n{fact.label}:",
                "answers": [fact.answer],
            }


def profiles_qa(sources: Sources, rng: np.random.Generator) -> Drawn:
    """A figure or a name out of one of a few profiles; the parts of the others that are there lack such an entry."""
    names = list(sources.profiles)
    every = {name: country.lines_of(profile) for name, profile in sources.profiles.items()}
    for name, fact in asked(sources, rng):
        entry = every[name][fact.line][1].partition(":")[0]
        texts = [excerpt(name, every[name], fact.line, (120, 200), rng)]
        for i in rng.permutation(len(names)):
            lines = every[names[i]]
            other = excerpt(names[i], lines, int(rng.integers(len(lines))), (120, 200), rng) if lines else entry
            if names[i] != name and entry not in other:
                texts.append(other)
            if len(texts) == PROFILES:
                break
        context = "\n\n".join(texts[i] for i in rng.permutation(len(texts)))
        if context.lower().count(fact.answer.lower()) == 1 and country.size(context) <= PROFILES * LONGEST_PROFILE:
            yield {
                "context": context,
                "input": f"From the profile of {name[1]} above:\n{fact.label}:",
                "answers": [fact.answer],
            }


def overview(sources: Sources, rng: np.random.Generator) -> Drawn:
    """The first two sentences of a country's economic overview, of the overview and more of the profile."""
    names = list(sources.profiles)
    for i in rng.permutation(len(names)):
        _, name = names[i]
        text = country.prose_of(sources.profiles[names[i]], "Economy", "Economy - overview")
        found = country.sentences(text)
        if 1000 <= len(text) <= 4500 and len(found) >= 5 and 120 <= len(" ".join(found[:2])) <= 420:
            yield {"context": text, "input": name, "answers": [" ".join(found[:2])]}


def region(sources: Sources, rng: np.random.Generator) -> Drawn:
    """The region of a country by its history, behind a solved example of each."""
    texts = histories(sources)
    for label, text in in_turn(texts, rng):
        examples = []
        for k in rng.permutation(len(texts)):
            other = list(texts)[k]
            own = [one for one in texts[other] if one != text]
            examples.append(f"{own[rng.integers(len(own))]}\nRegion: {other}")
        yield {
            "context": "\n\n".join([*examples, text]),
            "input": "Region:",
            "answers": [label],
            "all_classes": list(texts),
        }


REGIONS = {
    "africa": "Africa",
    "europe": "Europe",
    "middle-east": "Middle East",
    "south-america": "South America",
    "east-n-southeast-asia": "Asia",
    "australia-oceania": "Oceania",
}
HISTORY = 560  # characters, about a hundred words


def histories(sources: Sources) -> dict[str, list[str]]:
    """The first sentences of every country's history, by region."""
    found: dict[str, list[str]] = {label: [] for label in REGIONS.values()}
    for (place, _), profile in sources.profiles.items():
        text = ""
        for sentence in country.sentences(country.prose_of(profile, "Introduction", "Background")):
            if len(text) + len(sentence) > HISTORY:
                break
            text = f"{text} {sentence}".strip()
        if place in REGIONS and len(text) >= HISTORY // 3:
            found[REGIONS[place]].append(text)
    return found


def in_turn(texts: Mapping[str, list[str]], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Labels and texts, every label as often, in another order each time, until one has no text left."""
    left = {label: list(rng.permutation(len(own))) for label, own in texts.items()}
    while all(left.values()):
        for i in rng.permutation(len(left)):
            label = list(left)[i]
            yield label, texts[label][left[label].pop()]


def asked(sources: Sources, rng: np.random.Generator) -> Iterator[tuple[Name, country.Fact]]:
    """Countries in some order, each with one of its facts; again and again with others of them."""
    names = list(sources.profiles)
    facts = {name: list(country.facts_of(profile)) for name, profile in sources.profiles.items()}
    left = {name: list(rng.permutation(len(own))) for name, own in facts.items()}
    while any(left.values()):
        for i in rng.permutation(len(names)):
            if left[names[i]]:
                yield names[i], facts[names[i]][left[names[i]].pop()]


def excerpt(
    name: Name, lines: Sequence[country.Line], place: int, size: tuple[int, int], rng: np.random.Generator
) -> str:
    """Consecutive lines of a profile below its title, of about so many tokens, with the one at `place` anywhere."""
    enough = int(rng.integers(*size))
    start = end = place
    while end - start + 1 < len(lines) and sum(country.size(line) for _, line in lines[start : end + 1]) < enough:
        if start > 0 and (end + 1 == len(lines) or rng.random() < 0.5):
            start -= 1
        else:
            end += 1
    return "\n".join([f"{TITLE} {name[1]}", *(line for _, line in lines[start : end + 1])])


def next_line(sources: Sources, rng: np.random.Generator) -> Drawn:
    """The next line of a module, of which a like stands in the context."""
    for context, near, line in code.places(sources.modules, rng):
        yield {"context": context, "input": near, "answers": [line]}


SUBSETS = {
    "profile_qa": Subset(profile_qa, "single-doc QA", "contains", 12, PROFILE_PROMPT, 60, default=True, shipped=True),
    "profiles_qa": Subset(profiles_qa, "multi-doc QA", "contains", 12, "{context}\n\n{input}", 48),
    "overview": Subset(
        overview,
        "summarization",
        "rouge_l",
        96,
        "Sum up this overview of an economy in two sentences.\n\n{context}\n\nSummary:",
        48,
        plain=False,
    ),
    "region": Subset(region, "few-shot", "class", 6, "{context}\n{input}", 60, first_line=True, shipped=True),
    "next_line": Subset(next_line, "code", "edit_sim", 24, "{context}\n{input}", 60),
}


def samples(
    name: str, sources: Sources, seed: int, known: Collection[str] = (), text: bool = True
) -> list[dict[str, Any]]:
    """The samples of one subset, in the order of the draw, without those whose ids are in `known`.

    text: whether they have their text; without it they show what a model answers anyway.
    """
    subset, found = SUBSETS[name], []
    drawn = subset.draw(sources, np.random.default_rng([seed, 3, *name.encode()]))
    for i, sample in enumerate(drawn):
        id = f"{name}-{i:03d}"
        if id in known:
            continue
        if len(found) == subset.count:
            break
        found.append(
            {
                "input": sample["input"],
                "context": sample["context"] if text else NO_TEXT,
                "answers": sample["answers"],
                "length": len(sample["context"].split()),
                "dataset": name,
                "language": "code" if subset.category == "code" else "en",
                "all_classes": sample.get("all_classes"),
                "_id": id,
            }
        )
    return found


def known_of(seed: int) -> list[str]:
    """Ids of the samples that the model answered without their text."""
    return json.loads(KNOWN.read_text(encoding="utf-8")).get(str(seed), [])


def learn_known(record: Path, seed: int) -> list[str]:
    """Add the samples that a record, of what was written without text, has right. record: a folder with samples.jsonl.

    Answers that are compared by likeness, or one of a few classes, are no knowledge: only those of `contains` leave.
    """
    lines = (record / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}  # of a sample that was tried again the last one counts
    right = {
        row["tags"]["row_id"]
        for row in rows.values()
        if "error" not in row and row["tags"]["metric"] == "contains" and row["score"] == 1
    }
    known = sorted({*known_of(seed), *right})
    every = json.loads(KNOWN.read_text(encoding="utf-8")) | {str(seed): known}
    KNOWN.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    return known


def write(folder: Path, sources: Sources, seed: int, candidates: bool = False, text: bool = True) -> None:
    """The shipped subsets, or all, as JSON lines, and subsets.yaml with the prompt, metric and limits of each."""
    chosen = {name: subset for name, subset in SUBSETS.items() if subset.shipped or candidates}
    for name in chosen:
        write_rows(folder, name, samples(name, sources, seed, known_of(seed), text))
    described = {
        name: {
            "category": subset.category,
            "metric": subset.metric,
            "prompt": subset.prompt,
            "max_new_tokens": subset.max_new_tokens,
            "first_line": subset.first_line,
            "plain": subset.plain,
            "default": subset.default,
        }
        for name, subset in chosen.items()
    }
    (folder / "subsets.yaml").write_text(yaml.safe_dump(described, sort_keys=False), newline="\n", encoding="utf-8")
