"""InfiniteBench's passkey, number string and key-value retrieval: generators for any length, prompts and limits.

Paper: Zhang et al. 2024, InfiniteBench: extending long context evaluation beyond 100K tokens, arXiv:2402.13718.
Here:  prompts are lm_eval's, which are those for GPT-4, brought back to the benchmark's wording for open models.
"""

import hashlib
import random
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.errors import UserError
from methods.core.reading import read_bytes
from tasks.data.sources import parse_rows
from tasks.prompts import Template, lm_eval_task
from tasks.ruler.templates import noise


@dataclass(frozen=True)
class Variant:
    """task: its name in lm_eval.  metric: of MATCHING.  cue: end of the prompt.  digest: of the corrected template."""

    task: str
    metric: str
    max_new_tokens: int
    cue: str
    digest: str


VARIANTS = {
    "passkey": Variant("infinitebench_passkey", "first_number", 6, "\n\nThe pass key is", "5433394a"),
    "number_string": Variant(
        "infinitebench_number_string", "first_number", 12, "\n\nThe sequence of digits is", "37650b8c"
    ),
    "kv": Variant("infinitebench_kv_retrieval", "word", 50, "", "1a9c1475"),
}
# published files, by name
FILES = {"passkey": "passkey", "number_string": "number_string", "kv_retrieval": "kv"}


def template(kind: str) -> Template:
    """The prompt for open models. Raises UserError if the installed lm_eval words it in another way."""
    variant = VARIANTS[kind]
    theirs = lm_eval_task(variant.task, "infinitebench")
    head = theirs["description"]
    if kind == "passkey":
        head = head.replace("memorize them", "memorize it").replace(" information there.", " information.")
    text = f"{head}{theirs['doc_to_text']}{variant.cue}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    if digest != variant.digest:
        raise UserError(f"needle: lm_eval words the prompt of {kind} in another way; install lm_eval 0.4.13")
    return Template.parse(text, "{{context}}", "{{input}}")


@dataclass(frozen=True)
class Item:
    """A generated sample, by InfiniteBench's names."""

    context: str
    question: str
    answer: str


def passkey(rng: random.Random, n: int, at: int) -> Item:
    """n lines of noise and, behind the first `at` of them, a line that says five digits twice."""
    key = "".join(rng.choices("0123456789", k=5))
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Item(_in_noise(line, n, at), "What is the pass key?", key)


def number_string(rng: random.Random, n: int, at: int) -> Item:
    """As `passkey`, with ten digits that repeat each other."""
    digits = rng.choices("0123456789", k=5)
    for _ in range(5):
        at_digit = rng.randrange(len(digits))
        digits.insert(at_digit, digits[at_digit])
    number = "".join(digits)
    line = f"The sequence of digits is {number}. Remember it. {number} is the sequence of digits."
    return Item(_in_noise(line, n, at), "What is the sequence of digits?", number)


def _in_noise(line: str, n: int, at: int) -> str:
    return "".join([*[f"{noise()}\n"] * at, f"{line}\n", *[f"{noise()}\n"] * (n - at)])


def kv(rng: random.Random, n: int, at: int) -> Item:
    """n pairs of random identifiers in one JSON object on one line; the value of pair number `at` is asked."""

    def identifier() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    pairs = [(identifier(), identifier()) for _ in range(n)]
    key, value = pairs[at]
    written = ", ".join(f'"{a}": "{b}"' for a, b in pairs)
    question = f'\nKey: "{key}"\nThe value associated with the specified key is: '
    return Item(f"JSON data:\n{{{written}}}", question, value)


GENERATORS = {"passkey": passkey, "number_string": number_string, "kv": kv}


def read(kind: str, file: Path) -> list[dict[str, Any]]:
    """Published records as prompts. Depth is where the answer first stands, in tenths; length counts characters.

    Raises UserError that names the record that lacks something.
    """
    rows = []
    for number, row in enumerate(parse_rows(read_bytes(file), str(file)), start=1):
        try:
            answer = [str(one) for one in row["answer"]] if isinstance(row["answer"], list) else [str(row["answer"])]
            context, question = template(kind).fill(row["context"], row["input"])
            depth = 10 * round(10 * max(0, row["context"].find(answer[0])) / len(row["context"]))
        except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise UserError(f"{file}, record {number}: not one of InfiniteBench ({error})") from error
        rows.append(
            {
                "_id": f"{kind}/{row.get('id', number)}",
                "kind": kind,
                "length": 10_000 * round(len(row["context"]) / 10_000),
                "depth": depth,
                "context": context,
                "question": question,
                "answers": answer,
                "metric": VARIANTS[kind].metric,
                "max_new_tokens": VARIANTS[kind].max_new_tokens,
            }
        )
    return rows
