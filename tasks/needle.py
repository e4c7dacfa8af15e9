"""Needle in a haystack: what is hidden at a known depth of a long text; and passkeys, numbers, key-value pairs.

Origin: the public needle-in-a-haystack test of 2023 (grid, placing, needle); InfiniteBench, arXiv:2402.13718 (passkey,
        number string, key-value retrieval).
Here:   no judge: an answer is matched with the needle's phrases. The prompt around the text is our own. The kinds with
        several needles hide RULER's sentences at chosen depths. A kind `no_needle` asks the same question of a text
        without the needle: what a model answers there, it knew before.
"""

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from methods.core.errors import UserError
from methods.core.reading import read_bytes
from tasks import grid, infinite
from tasks.base import Example
from tasks.data.haystack import FAR, Hidden, even_depths, hide, read_haystack, sigmoid_depths
from tasks.data.pins import PINNED
from tasks.data.sources import expand, parse_rows
from tasks.grid import Grid
from tasks.ruler import niah
from tasks.ruler.templates import needle as sentence
from tasks.scoring import matching
from tasks.scoring.metrics import first_line
from tasks.tokens import Tokens

BUNDLED = Path(__file__).parent.parent / "assets" / "needle-mini"
NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
PHRASES = ["eat a sandwich", "dolores park", "sunny day"]
BEFORE = "A long text stands between the two marks. One sentence in it answers the question below.\n<text>\n"
AFTER = (
    "\n</text>\nAnswer in one short sentence, with what the text says and nothing else.\n"
    "Question: What is the best thing to do in San Francisco?\nAnswer:"
)
PROMPT_VERSION = hashlib.sha256(f"{BEFORE}\0{AFTER}\0{NEEDLE}".encode()).hexdigest()[:8]
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
PLAIN = ("single", "no_needle")
SEVERAL = {"multi_key": (False, False), "multi_value": (True, True), "multi_query": (False, True)}
RELAXED = "passkey_relaxed"
KINDS = (*PLAIN, *SEVERAL, *infinite.VARIANTS, RELAXED)
NEW_TOKENS = {**dict.fromkeys(PLAIN, 50), **dict.fromkeys(SEVERAL, 128), RELAXED: 32}
USUAL = {"seed": 42, "needles": 4, "metric_name": "contains"}
KEPT = 0.99  # of the full cache's score
FAILED = 0.5  # a cell in which the full cache scores less says nothing about compression
METRICS = {"contains": PHRASES, "rouge1": [NEEDLE], "rouge_pkg": [NEEDLE]}


@dataclass
class Needle(Grid):
    """A grid of lengths and depths.

    data: "bundled"; "prose", "real" (bundled verses) or "hub" (essays) to hide needles in that text; or a path: .jsonl
        prompts, InfiniteBench's files, a text, or a folder of texts.
    kinds, lengths, depths: what to take, or to make.  lengths: tokens, or shares of the window up to 1.
    repeats: prompts per cell.  needles: of the kinds with several.
    metric_name: of "single": "contains", the share of three phrases; "rouge1", ROUGE-1 F with stems, of which published
        scores are ten times the value; "rouge_pkg", that of the package `rouge`.
    """

    data: str = "bundled"
    kinds: Sequence[str] | str | None = None
    lengths: Sequence[float] | float | str | None = None
    depths: Sequence[float] | float | str | None = None
    repeats: int = 1
    needles: int = 4
    metric_name: str = "contains"
    limit: int | None = None
    revision: str = PINNED
    data_seed: int = 42

    of_samples = frozenset({"data_sha256", "prompt", "metric"})

    def __post_init__(self) -> None:
        self._begin("needle", BUNDLED, ("repeats", "limit", "needles"))
        if self.needles < 2:
            raise UserError(f"needle: task.needles={self.needles}; several needles are 2 or more")
        if self.metric_name not in METRICS:
            raise UserError(f"needle: task.metric_name={self.metric_name}; give one of {', '.join(METRICS)}")

    @property
    def name(self) -> str:
        if self.data == "bundled":
            return "needle-mini"
        if self.data == "real":
            return "needle-real"
        return "needle-custom" if self._written and not self._official else "needle"

    def source(self) -> str:
        kinds = f"{len(self._kinds)} kind{'s'[: len(self._kinds) > 1]}"
        if self._written:
            origin = "bundled" if self.data == "bundled" else self.data
            return f"{self.name} ({origin}), {kinds}, {len(self.examples())} samples, sha256 {self._written[1][:12]}"
        lengths, depths = len(self._asked_lengths), len(self._depths)
        hay = f"{self._haystack.where}, sha256 {self._haystack.sha256[:12]}"
        n = len(self._kinds) * lengths * depths * self.repeats
        return f"{self.name} (in {hay}), {kinds}, {lengths} lengths x {depths} depths, {n} samples"

    @property
    def fingerprint(self) -> dict[str, Any]:
        fingerprint: dict[str, Any] = {"task": self.name, "matching": matching.VERSION}
        fingerprint["data_sha256"] = grid.digest_of(self.examples())
        if "single" in self._kinds and not self._written:
            fingerprint |= {"prompt": PROMPT_VERSION, "metric": self.metric_name}
        if not self._written:  # what makes other samples of the same ids
            changed = {"seed": self.data_seed, "needles": self.needles, "metric_name": self.metric_name}
            fingerprint |= {key: value for key, value in changed.items() if value != USUAL[key]}
        return fingerprint

    def examples(self) -> list[Example]:
        return self._examples

    def score(self, example: Example, prediction: str) -> float:
        if example.tags["subset"] in PLAIN and not self._written:
            prediction = first_line(prediction)  # what follows would only lower ROUGE's precision
        return super().score(example, prediction)

    def remarks(self, rows: Sequence[tuple[Example, Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
        """The cells of the grid: the worst, how many keep the full cache's score, where the full cache itself fails."""
        cells: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        for example, ours, full in rows:
            if not example.tags.get("control"):
                cell = example.tags["subset"], example.tags["length"], example.tags["depth"]
                cells.setdefault(cell, []).append((ours["score"], full["score"]))
        if not cells:
            return []
        means = {cell: (fmean(a for a, _ in pairs), fmean(b for _, b in pairs)) for cell, pairs in cells.items()}
        (kind, length, depth), (score, _) = min(means.items(), key=lambda item: item[1][0])
        kept = sum(score >= KEPT * full for score, full in means.values())
        failed = sum(full < FAILED for _, full in means.values())
        return [
            f"{len(means)} cells: {kept} keep {KEPT:.0%} of the full cache's score; worst {100 * score:.1f} "
            f"({kind}, {length} tokens, depth {depth:g} %); the full cache itself fails in {failed}"
        ]

    @property
    def _official(self) -> bool:
        """Whether the data are InfiniteBench's own files."""
        return self.data not in ("bundled", "real") and self._infinite_files != {}

    @cached_property
    def _infinite_files(self) -> dict[str, Path]:
        path = expand(self.data)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        return {infinite.FILES[f.stem]: f for f in files if f.stem in infinite.FILES and f.is_file() and _is_theirs(f)}

    @cached_property
    def _written(self) -> tuple[dict[str, list[dict[str, Any]]], str] | None:
        """Prompts that are written out, and their hash; None where they are made."""
        if self.data == "bundled":
            return grid.read_prompts(BUNDLED, "needle")
        if self.data == "real":
            return None
        if self._official:
            rows = {kind: infinite.read(kind, file) for kind, file in self._infinite_files.items()}
            raw = b"".join(file.read_bytes() for file in self._infinite_files.values())
            return rows, hashlib.sha256(raw).hexdigest()
        return grid.read_prompts(expand(self.data), "needle") if grid.holds_prompts(self.data) else None

    @cached_property
    def _kinds(self) -> list[str]:
        if self._written:
            return grid.choose("needle", "kinds", self.kinds, self._written[0])
        return grid.choose("needle", "kinds", "single" if self.kinds is None else self.kinds, KINDS)

    @cached_property
    def _haystack(self) -> Any:
        return read_haystack(self.data, self.revision)

    @cached_property
    def _asked_lengths(self) -> list[float]:
        if self.lengths is None:
            return list(SHARES)
        if self.lengths == "original":
            return [round(1000 + i * 15000 / 34) for i in range(35)]
        asked = grid.as_list(self.lengths)
        if not asked or not all(isinstance(n, int | float) and n > 0 for n in asked):
            raise UserError(f"needle: task.lengths={self.lengths}; give tokens, shares of the window, or original")
        return list(dict.fromkeys(asked))

    @cached_property
    def _depths(self) -> list[float]:
        if self.depths is None:
            return even_depths(11)
        if self.depths in ("sigmoid", "original"):
            return sigmoid_depths(11) if self.depths == "sigmoid" else even_depths(35)
        asked = grid.as_list(self.depths)
        if not asked or not all(isinstance(d, int | float) and 0 <= d <= 100 for d in asked):
            raise UserError(f"needle: task.depths={self.depths}; give per cent from 0 to 100, sigmoid or original")
        return list(dict.fromkeys(map(float, asked)))

    @cached_property
    def _examples(self) -> list[Example]:
        if self._written:
            examples = grid.examples_of(self._written[0], self._kinds)
            offered = {}
            for key, typed in (("length", self.lengths), ("depth", self.depths)):
                offered[key] = grid.choose("needle", f"{key}s", typed, sorted({e.tags[key] for e in examples}))
            kept = [e for e in examples if all(e.tags[key] in values for key, values in offered.items())]
            return grid.limited(kept, self.limit)
        tokens = self._tokens
        assert tokens is not None, "fit comes before examples"
        # a share and a number may be the same
        lengths = dict.fromkeys(tokens.resolve("needle", length) for length in self._asked_lengths)
        examples = [
            self._example(tokens, kind, length, depth, repeat)
            for kind in self._kinds
            for length in lengths
            for depth in self._depths
            for repeat in range(self.repeats)
        ]
        self._report_moves(examples)
        return grid.limited(examples, self.limit)

    def _report_moves(self, examples: Sequence[Example]) -> None:
        far = [e for e in examples if e.tags.get("moved", 0) > FAR * e.tags["length"]]
        if far:
            logging.getLogger(__name__).warning(
                "needle: in %d of %d samples a needle stands more than %g %% of the length before its depth, where the "
                "last sentence ends, first in %s", len(far), len(examples), 100 * FAR, far[0].id,
            )  # fmt: skip

    def _example(self, tokens: Tokens, kind: str, length: int, depth: float, repeat: int) -> Example:
        rng = random.Random(f"{self.data_seed}/{kind}/{length}/{depth:g}/{repeat}")
        if kind in PLAIN:
            sample = self._plain(tokens, kind, length, depth, repeat)
        elif kind in SEVERAL:
            sample = self._several(tokens, kind, length, depth, repeat, rng)
        else:
            sample = self._infinite(tokens, kind, length, depth, rng)
        tags = {"subset": kind, "category": kind, "length": length, "depth": depth, "control": kind == "no_needle"}
        return Example(
            id=f"{kind}/{length}/{depth:g}/{repeat}",
            context=sample["context"],
            question=sample["question"],
            prefill=sample.get("prefill", ""),
            answers=sample["answers"],
            max_new_tokens=self._new_tokens(kind),
            chat=sample.get("chat", True),
            lead=sample.get("lead", ""),
            tags=tags | {"metric": sample["metric"], "moved": sample.get("moved", 0)},
        )

    def _new_tokens(self, kind: str) -> int:
        return NEW_TOKENS[kind] if kind in NEW_TOKENS else infinite.VARIANTS[kind].max_new_tokens

    def _hide(self, tokens: Tokens, length: int, needles: list[tuple[str, float]], repeat: int, spent: int) -> Hidden:
        """Needles in the haystack, which starts later for every repeat; `spent` tokens are the prompt's other parts."""
        ids = self._haystack.ids(tokens, length * (repeat + 1))
        return hide(tokens, ids[length * repeat :], length, needles, max(spent, 200))

    def _plain(self, tokens: Tokens, kind: str, length: int, depth: float, repeat: int) -> dict[str, Any]:
        spent = tokens.count(BEFORE) + tokens.count(AFTER) + tokens.wrapper + NEW_TOKENS[kind]
        hidden = self._hide(tokens, length, [(NEEDLE, depth)] if kind == "single" else [], repeat, spent)
        return {
            "lead": BEFORE,
            "context": BEFORE + hidden.text,
            "question": AFTER,
            "answers": METRICS[self.metric_name],
            "metric": self.metric_name,
            "moved": hidden.moved,
        }

    def _several(
        self, tokens: Tokens, kind: str, length: int, depth: float, repeat: int, rng: random.Random
    ) -> dict[str, Any]:
        """Needles of RULER's wording; of several keys the first is asked for, unless all are."""
        one_key, all_asked = SEVERAL[kind]
        n = self.needles
        keys = [niah.item(rng, "words") for _ in range(1 if one_key else n)] * (n if one_key else 1)
        values = [niah.item(rng, "numbers") for _ in range(n)]
        if kind == "multi_key":
            depths = [depth, *(100 * (i + 0.5) / (n - 1) for i in range(n - 1))]
        else:
            depths = [depth + i * (100 - depth) / n for i in range(n)]
        lines = [sentence().format(type_needle_v="numbers", key=k, value=v) for k, v in zip(keys, values)]
        names = list(dict.fromkeys(keys))
        query = f"{', '.join(names[:-1])}, and {names[-1]}" if kind == "multi_query" else names[0]
        spec = niah.Needles(len(names), n if one_key else 1, n if kind == "multi_query" else 1, "essay")
        spent = sum(map(tokens.count, niah.fill("", query, spec))) + tokens.wrapper + NEW_TOKENS[kind]
        hidden = self._hide(tokens, length, list(zip(lines, depths)), repeat, spent)
        context, question, prefill = niah.fill(hidden.text, query, spec)
        return {
            "context": context,
            "question": question,
            "prefill": prefill,
            "answers": values if all_asked else values[:1],
            "metric": "all",
            "moved": hidden.moved,
        }

    def _infinite(self, tokens: Tokens, kind: str, length: int, depth: float, rng: random.Random) -> dict[str, Any]:
        """As many lines or pairs as fit, and the asked one at its depth among them."""
        variant = "passkey" if kind == RELAXED else kind
        template, state = infinite.template(variant), rng.getstate()
        room = length - self._new_tokens(kind)

        def draw_sample(n: int) -> tuple[infinite.Item, str, str]:
            rng.setstate(state)
            at = round(depth / 100 * (n - 1 if variant == "kv" else n))
            item = infinite.GENERATORS[variant](rng, n, at)
            return item, *template.fill(item.context, item.question)

        def size(n: int) -> int:
            return tokens.count("".join(draw_sample(n)[1:]))

        n = max(1, int(room / (size(40) - size(20)) * 20))
        while n > 1 and size(n) > room:
            n -= max(1, n // 100)
        item, context, question = draw_sample(n)
        if size(n) > room:
            raise UserError(f"needle: task.lengths={length} tokens are too few for one sample of {kind}")
        metric = "all" if kind == RELAXED else infinite.VARIANTS[kind].metric
        return {"context": context, "question": question, "answers": [item.answer], "metric": metric, "chat": False}


def _is_theirs(file: Path) -> bool:
    """Whether a file has InfiniteBench's records, by its first one."""
    rows = parse_rows(read_bytes(file).split(b"\n", 1)[0], str(file))
    return bool(rows) and {"context", "input", "answer"} <= rows[0].keys()
