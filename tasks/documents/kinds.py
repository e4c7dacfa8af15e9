"""One function per kind of document; together they are the `KINDS` table.

Each takes a `Pool` (random source, names, values), the wanted size of the context in characters, and the number of
questions; it gives a `Document` whose size is close to the wanted one and whose turns ask for different things.
`style` says how a question ends: "prefix" (with the start of the answer, up to the value), "restate" (the answer itself
says the key before the value), "bare" (after the words "Short answer:", the value alone).
"""

from collections.abc import Callable
from itertools import pairwise

from tasks.documents.document import Document, Turn
from tasks.documents.pools import Pool, pick, shuffled, words

STYLES = ("prefix", "restate", "bare")
_ATTRIBUTES = words(
    "harbour teacher colour engine doctor garden motto anthem pilot library season cousin festival vehicle mentor "
    "hobby tool badge rival dish instrument flower password office school"
)
_BUILDINGS = words("market bridge station harbour school mill chapel museum")
_ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth", "Sixth")


def pairs(pool: Pool, size: int, turns: int, style: str = "prefix") -> Document:
    """Names directly followed by values."""
    entries, used = [], 0
    while used < size or not entries:
        entries.append((pool.name(), pool.value()))
        used += len(entries[-1][0]) + len(entries[-1][1]) + 3
    text = " ".join(f"{key} {value}." for key, value in entries)
    asked = shuffled(pool.rng, range(len(entries)))[:turns]
    questions = tuple(_turn(f"Question: {entries[i][0]}?", entries[i][0], entries[i][1], style) for i in asked)
    return Document("pairs", "Each name is followed by its value.", text, questions, asked[0] / len(entries))


def table(pool: Pool, size: int, turns: int, style: str = "prefix") -> Document:
    """Key-value records, one per line, keys in lower case."""
    entries, used = [], 0
    while used < size or not entries:
        entries.append((pool.word(), pool.value()))
        used += len(entries[-1][0]) + len(entries[-1][1]) + 6
    text = "\n".join(f"- {key}: {value}." for key, value in entries)
    asked = shuffled(pool.rng, range(len(entries)))[:turns]
    questions = tuple(
        _turn(f"Question: What is stored under {entries[i][0]}?", f"{entries[i][0]}:", entries[i][1], style)
        for i in asked
    )
    return Document("table", "Look up the value of a key in this list.", text, questions, asked[0] / len(entries))


def facts(pool: Pool, size: int, turns: int, style: str = "prefix", filler: float = 0.4, most: int = 3) -> Document:
    """Attributes of people among filler: every person has one to `most`, every attribute belongs to several people."""
    entries, used = [], 0
    while used < size * (1 - filler) or not entries:
        name = pool.name()
        attributes = shuffled(pool.rng, _ATTRIBUTES)[: 1 + int(pool.rng.integers(most))]
        for attribute in attributes:
            entries.append((f"The {attribute} of {name} is", pool.value(), f"What is the {attribute} of {name}?"))
            used += len(entries[-1][0]) + len(entries[-1][1]) + 2
    entries = shuffled(pool.rng, entries)
    text, depths = _hide(pool, [f"{start} {value}." for start, value, _ in entries], size)
    asked = shuffled(pool.rng, range(len(entries)))[:turns]
    questions = tuple(_turn(f"Question: {entries[i][2]}", entries[i][0], entries[i][1], style) for i in asked)
    return Document("facts", "Read the report and answer the question.", text, questions, depths[asked[0]])


def needle(pool: Pool, size: int, turns: int, style: str = "prefix", needles: int = 1) -> Document:
    """Pass codes hidden at random depths of a text that is otherwise filler; `needles` - 1 of them are distractors."""
    entries = [(f"The pass code for {pool.name()} is", pool.number(5, 7)) for _ in range(needles)]
    text, depths = _hide(pool, [f"{start} {value}." for start, value in entries], size)
    asked = shuffled(pool.rng, range(needles))[:turns]
    questions = tuple(_turn(f"Question: {_ask(entries[i][0])}", *entries[i], style) for i in asked)
    return Document(
        "needle", "Some pass codes are hidden in this text. Remember them.", text, questions, depths[asked[0]]
    )


def chains(pool: Pool, size: int, turns: int, links: int = 3, filler: float = 0.4, restate: bool = True) -> Document:
    """Shuffled links from name to name that end in a value; the answer writes the whole chain out.

    restate: the answer says every name twice, as the links do; otherwise it goes on from the name it has reached.
    """
    lines, chains_, used = [], [], 0
    while used < size * (1 - filler) or not chains_:
        names = [pool.name() for _ in range(links)]
        steps = [f"{a} follows {b}." for a, b in pairwise(names)] + [f"{names[-1]} holds {pool.value()}."]
        chains_.append(steps)
        lines += steps
        used += sum(map(len, steps)) + len(steps)
    text, _ = _hide(pool, shuffled(pool.rng, lines), size)
    questions = []
    for steps in shuffled(pool.rng, chains_)[:turns]:
        first, *rest = steps[0].removesuffix(".").split(maxsplit=1)
        if not restate:
            rest += [step.removesuffix(".").split(maxsplit=1)[1] for step in steps[1:]]
        answer = f" {' '.join(rest)}." if not restate else " ".join(steps)[len(first) :]
        questions.append(Turn(f"Question: What does {first} lead to?\nAnswer: {first}", answer, answer))
    return Document(
        "chains", "Follow the links from one name to the next until a value is held.", text, tuple(questions)
    )


def bridge(pool: Pool, size: int, turns: int, passages: int = 0, restate: bool = True) -> Document:
    """Titled passages about one person each; a question needs one fact of a passage and one of another.

    passages: how many, 0 for one per 400 characters, at least two.  restate: the answer says the second person's
    name twice; otherwise it goes on from it.
    """
    n = max(2, passages or size // 400)
    people = [pool.name() for _ in range(n)]
    towns = [pool.word().capitalize() for _ in range(n)]
    order = shuffled(pool.rng, range(n))
    guide = {order[i]: order[(i + 1) % n] for i in range(n)}  # one cycle: nobody guides themselves
    room, texts = max(0, size // n - 110), []
    for i in range(n):
        lines = [f"The guide of {people[i]} is {people[guide[i]]}."]
        lines.append(f"The town of {people[i]} is {towns[i]}." if restate else f"{people[i]} runs {towns[i]}.")
        body, _ = _hide(pool, shuffled(pool.rng, lines), len(lines[0]) + len(lines[1]) + room)
        texts.append(f"Passage {i + 1}: {people[i]}" + ("\n" if restate else ". ") + body)
    questions = []
    for i in shuffled(pool.rng, range(n))[:turns]:
        person, other, town = people[i], people[guide[i]], towns[guide[i]]
        asked = f"What is the town of the guide of {person}?" if restate else f"What does the guide of {person} run?"
        answer = f" {other}. The town of {other} is {town}." if restate else f" {other} runs {town}."
        questions.append(Turn(f"Question: {asked}\nAnswer: The guide of {person} is", answer, answer[1:]))
    return Document(
        "bridge", "Answer the question with the help of these passages.", "\n\n".join(texts), tuple(questions)
    )


def findings(pool: Pool, size: int, turns: int = 1, points: int = 3) -> Document:
    """A report with numbered findings spread over it; the summary lists the findings in order."""
    forms = (
        "the {a} of {n} needs {v}",
        "the council gave {v} to {n}",
        "{n} will repair the {a} with {v}",
        "the {a} of {n} was sold for {v}",
        "{n} found {v} near the {a}",
    )
    lines = []
    for i in range(points):
        said = pick(pool.rng, forms).format(a=pick(pool.rng, _ATTRIBUTES), n=pool.name(), v=pool.value())
        lines.append(f"{_ORDINALS[i]} finding: {said}.")
    text, _ = _hide(pool, lines, size)
    answer = " " + " ".join(lines)
    return Document("findings", "Sum up this report by its findings.", text, (Turn("Summary:", answer, answer[1:]),))


def labels(pool: Pool, size: int, turns: int, classes: int = 5, named: bool = True) -> Document:
    """Examples of things with a label each; things come back, and the label of one that was seen is asked.

    named: the label's line names the thing ("Kind of X: label"); otherwise it says "Kind: label" only.
    """
    kinds = [pool.word() for _ in range(classes)]
    things = {pool.word(): pick(pool.rng, kinds) for _ in range(max(4, size // 180))}
    forms = (
        "Text: she bought a {a} {t}",
        "Text: he lost the {a} {t}",
        "Text: we saw one {a} {t}",
        "Text: a very {a} {t}",
    )
    adjectives = ("red", "small", "old", "new", "wet", "dark", "long", "soft")

    def example(thing: str) -> str:
        start = pick(pool.rng, forms).format(a=pick(pool.rng, adjectives), t=thing)
        return f"{start}\nKind of {thing}:" if named else f"{start}\nKind:"

    lines, used, seen = [], 0, []
    while used < size or not lines:
        thing = pick(pool.rng, list(things))
        lines.append(f"{example(thing)} {things[thing]}")
        used += len(lines[-1]) + 2
        seen.append(thing)
    asked = shuffled(pool.rng, sorted(set(seen)))[:turns]
    questions = tuple(Turn(f"Now this one.\n{example(t)}", f" {things[t]}", things[t]) for t in asked)
    return Document("labels", "Give the kind of each thing.", "\n\n".join(lines), questions, classes=tuple(kinds))


def passages(pool: Pool, size: int, turns: int, marked: bool = True) -> Document:
    """Numbered paragraphs of unlike sentences; the number of the one that holds a given sentence is asked.

    marked: every sentence ends with its paragraph's number in brackets; otherwise only the paragraph begins with it.
    """
    forms = (
        "{n} bought {v} at the {p}",
        "{n} carried {v} to the {p}",
        "{n} painted {v} behind the {p}",
        "{n} lost {v} on the {p}",
    )
    return _paragraphs("passages", pool, size, turns, forms, marked)


def entries(pool: Pool, size: int, turns: int) -> Document:
    """Numbered paragraphs as in `passages`, marked, whose sentences end with what tells them apart."""
    forms = (
        "at the {p} {n} bought {v}",
        "near the {p} {n} sold {v}",
        "from the {p} {n} brought {v}",
        "in the {p} {n} saw {v}",
    )
    return _paragraphs("entries", pool, size, turns, forms, True)


def _paragraphs(kind: str, pool: Pool, size: int, turns: int, forms: tuple[str, ...], marked: bool) -> Document:
    texts, said, used = [], [], 0
    while used < size or not texts:
        number = len(texts) + 1
        sentences = [
            pick(pool.rng, forms).format(n=pool.name(), v=pool.value(), p=pick(pool.rng, _BUILDINGS))
            for _ in range(2 + int(pool.rng.integers(2)))
        ]
        mark = f" [{number}]." if marked else "."
        body = shuffled(
            pool.rng, [s + mark for s in sentences] + [pool.filler() for _ in range(int(pool.rng.integers(3)))]
        )
        texts.append(f"Paragraph {number}: " + " ".join(body))
        said += [(sentence, number) for sentence in sentences]
        used += len(texts[-1]) + 2
    questions = []
    for sentence, number in shuffled(pool.rng, said)[:turns]:
        question = f'Question: Which paragraph says "{sentence}"?\nAnswer: {sentence} ['
        questions.append(Turn(question, f"{number}].", str(number)))
    return Document(kind, "Find the paragraph that a sentence comes from.", "\n\n".join(texts), tuple(questions))


def code(pool: Pool, size: int, turns: int) -> Document:
    """A module of functions and constants, then lines that use them and are to be completed."""
    parts, uses, used = [], [], 0
    while used < size or not parts:
        if pool.rng.random() < 0.3:
            name, value = f"{pool.word()}_{pool.word()}", pool.number(2, 5)
            parts.append(f'limits["{name}"] = {value}')
            uses.append((f'assert limits["{name}"] ==', f" {value}", value))
        else:
            name, args = f"{pool.word()}_{pool.word()}", [pool.word() for _ in range(1 + int(pool.rng.integers(3)))]
            operator = pick(pool.rng, ("+", "-", "*"))
            body = (
                f" {operator} ".join(args)
                if len(args) > 1
                else f"{args[0]} {operator} {int(pool.rng.integers(2, 100))}"
            )
            doc = f'    """{pool.filler()}"""\n' if pool.rng.random() < 0.5 else ""
            parts.append(f"def {name}({', '.join(args)}):\n{doc}    return {body}")
            uses.append((f"result = {name}(", f"{', '.join(args)})", ", ".join(args)))
        used += len(parts[-1]) + 2
    questions = tuple(Turn(*use) for use in shuffled(pool.rng, uses)[:turns])
    return Document("code", "Complete the last line of this Python module.", "\n\n".join(parts), questions)


def copies(pool: Pool, size: int, turns: int = 0) -> Document:
    """Random words, then the same words again."""
    words, used = [], 0
    while used < size / 2 or not words:
        words.append(pool.value() if pool.rng.random() < 0.5 else pool.name())
        used += len(words[-1]) + 1
    text = " ".join(words)
    return Document("copies", "", f"{text}\n\n{text}")


KINDS: dict[str, Callable[..., Document]] = {
    f.__name__: f
    for f in (pairs, table, facts, needle, chains, bridge, findings, labels, passages, entries, code, copies)
}


def _turn(question: str, start: str, value: str, style: str) -> Turn:
    """The three ways to ask for `value`, whose sentence begins with `start`."""
    if style == "prefix":
        return Turn(f"{question}\nAnswer: {start}", f" {value}.", value)
    if style == "restate":
        return Turn(f"{question}\nAnswer:", f" {start} {value}.", value)
    if style == "bare":
        return Turn(f"{question}\nShort answer:", f" {value}.", value)
    raise ValueError(f"documents: style={style!r}; one of {', '.join(STYLES)}")


def _ask(start: str) -> str:
    return "What is t" + start[1:].removesuffix(" is") + "?"


def _hide(pool: Pool, lines: list[str], size: int) -> tuple[str, list[float]]:
    """`lines` in order at random places of a text of about `size` characters; also each one's relative place."""
    filler, used = [], sum(map(len, lines)) + len(lines)
    while used < size:
        filler.append(pool.filler())
        used += len(filler[-1]) + 1
    slots = sorted(int(pool.rng.integers(len(filler) + 1)) for _ in lines)
    parts: list[str] = []
    starts, at = [], 0
    for slot, line in zip(slots, lines):
        parts += filler[at:slot]
        starts.append(sum(map(len, parts)) + len(parts))
        parts.append(line)
        at = slot
    parts += filler[at:]
    text = parts[0]
    for i, part in enumerate(parts[1:], start=2):
        # a new paragraph now and then, as in real text
        text += ("\n" if i % 8 == 0 else " ") + part
    return text, [p / max(1, len(text)) for p in starts]
