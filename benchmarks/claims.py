"""Which of the papers' claims hold on the reference model, in kind: `python benchmarks/claims.py`.

Takes the records behind the core table (`python benchmarks/tables.py core`), runs what the claims need besides them
(what is on disk is not run again), and writes results/claims.json and its table in docs/results.md. Every number is
a mean over the same samples on both sides, with the 95 % interval of a paired bootstrap; of a method that draws at
random it is a mean over at least three seeds, and seeds are drawn again as samples are. A comparison holds where all of
its interval lies on the claim's side of the border, does not hold where none of it does, and else cannot be told here.
A claim whose records are not there is named and left out.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # run as a file, only its own folder would be on the path

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from analysis import stats  # noqa: E402
from analysis.load import NothingToRead, Results, load_results  # noqa: E402
from analysis.names import numbers_of  # noqa: E402
from analysis.tables import HELD, NOT_HELD, OPEN  # noqa: E402
from benchmarks.tables import RANDOM, SEEDS, searched  # noqa: E402

TASKS = ("longbench-mini", "needle-mini", "reasoning-mini", "summarization-mini")
RATES = (8, 16, 32)
PROTOCOLS = ("aware", "agnostic")
NACL_LEFT = 0.95  # of the full cache's score, with half of the cache
KIVI_LOST = 1.0  # points of 100, at 4 bits
SAME_BYTES = 0.005  # two tables within this share of each other are equally large
LEFT_WHOLE = 0.5 + 0.5 / RATES[0]  # bytes of a model of four layers of which two are whole and two at the first rate
ASSETS = HOME / "assets"


@dataclass(frozen=True)
class Row:
    """One comparison: what, its value and interval as shown, samples and seeds, and what it says of the claim."""

    what: str
    value: float
    low: float
    high: float
    unit: str
    n: int
    verdict: str
    seeds: int = 1


@dataclass(frozen=True)
class Claim:
    """What a paper says, in kind, and the comparisons that test it here."""

    method: str
    claim: str
    rows: list[Row]


class Records:
    """Cells of one results folder, found by what was asked for."""

    def __init__(self, results: Results, seeds: int = len(SEEDS)):
        self.results, self.seeds = results, seeds  # seeds that a method which draws at random needs
        self.mixed = numbers_of(results.cells)  # bytes of two types are no one scale

    def samples(self, task: str, method: str, budget: float = 1.0, protocol: str = "aware", **knobs: object) -> Scores:
        """The finished samples of the cells that have these knobs, one cell per seed.

        Raises NothingToRead if there is none, if a method that draws at random has too few seeds, and where caches of
        several types lie in the folder.
        """
        if self.mixed:
            raise NothingToRead(
                f"{self.results.root}: {self.mixed[0]}; claims take records of one, in a folder of its own"
            )
        cells = self.results.cells
        same = cells[(cells["task"] == task) & (cells["method"] == method) & (cells["protocol"] == protocol)]
        where = f"{method} at budget {budget:g} {knobs or ''} on {task}, {protocol}"
        by_seed: dict[int, pd.DataFrame] = {}
        for cell, row in same.iterrows():
            config = json.loads(row["config"])
            asked = math.isclose(row["budget"], budget) and all(config.get(k) == v for k, v in knobs.items())
            if asked and not _extra(config, knobs) and "last_token" not in json.loads(row["passes"]):
                rows = self.results.finished[self.results.finished["cell"] == cell].set_index("id")
                by_seed.setdefault(int(row["seed"]), rows)
                if method not in RANDOM:  # its seeds are the same run again
                    break
        if not by_seed:
            raise NothingToRead(f"no cell of {where}")
        if method in RANDOM and len(by_seed) < self.seeds:
            raise NothingToRead(f"{where} draws at random and has {len(by_seed)} of {self.seeds} seeds")
        return Scores([by_seed[seed] for seed in sorted(by_seed)], row["metric"], row["mean_over"], method)


def _extra(config: dict, knobs: dict) -> bool:
    """Whether the cell has bits, a table or skipped layers that were not asked for."""
    return any(config.get(key) and key not in knobs for key in ("key_bits", "table", "skip"))


@dataclass(frozen=True)
class Scores:
    """Samples by id with subset, category, score and bytes, a table per seed; how the task shows and averages them."""

    seeds: list[pd.DataFrame]
    metric: dict
    mean_over: str
    method: str

    def only(self, ids: set[str]) -> Scores:
        """The scores of these samples alone."""
        return Scores([seed[seed.index.isin(ids)] for seed in self.seeds], self.metric, self.mean_over, self.method)

    @property
    def bytes(self) -> float:
        """Mean bytes held per sample, over seeds."""
        return float(np.mean([seed["bytes"].mean() for seed in self.seeds]))


def both(a: Scores, b: Scores) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean scores of the samples that both have, resampled alike: [1 + R] each, the means themselves first; and n.

    Seeds are drawn for the whole task, and for each side by itself.
    """
    columns = [scores["score"].rename(i) for i, scores in enumerate([*a.seeds, *b.seeds])]
    joined = a.seeds[0][["category", "subset"]].join(columns, how="inner").sort_index()
    if joined.empty:
        raise NothingToRead("two cells have no sample in common")
    subsets = joined.groupby(["category", "subset"])
    share = stats.subset_weights([category for category, _ in subsets.groups], a.mean_over)
    total = np.zeros((1 + stats.RESAMPLES, len(columns)))
    for weight, ((category, name), part) in zip(share, subsets, strict=True):
        values = part[list(range(len(columns)))].to_numpy(dtype=float)
        key = stats.stratum(str(category), str(name))
        total += weight * stats.bootstrap(values, np.ones(len(part)), list(part.index), key)
    sides = np.split(total, [len(a.seeds)], axis=1)
    ours, theirs = (
        (side * stats.seed_weights(side.shape[1], scores.method)).sum(axis=1) for side, scores in zip(sides, (a, b))
    )
    return ours, theirs, len(joined)


def verdict(estimate: stats.Estimate, border: float = 0.0, strict: bool = True) -> str:
    """What an interval says of "above the border"; strict: on the border is not above it, so that a tie is no win."""
    if estimate.low > border or (estimate.low == border and not strict):
        return HELD
    return NOT_HELD if estimate.high < border else OPEN


def difference(what: str, ours: Scores, theirs: Scores, border: float = 0.0, strict: bool = True) -> Row:
    """Ours less theirs, above 0 where ours is better, and whether it is above the border."""
    a, b, n = both(ours, theirs)
    sign = 1 if ours.metric["better"] == "higher" else -1
    estimate = stats.estimate(sign * ours.metric["scale"] * (a - b))
    said = verdict(estimate, border, strict)
    return Row(what, estimate.value, estimate.low, estimate.high, ours.metric["unit"], n, said, len(ours.seeds))


def left(what: str, ours: Scores, full: Scores, least: float) -> Row:
    """The share of the full cache's score that is left, in percent."""
    a, b, n = both(ours, full)
    estimate = stats.retained(a, b)
    if estimate is None:
        raise NothingToRead(f"{what}: the full cache scores nothing")
    said = verdict(estimate, least, strict=False)
    return Row(what, 100 * estimate.value, 100 * estimate.low, 100 * estimate.high, "%", n, said, len(ours.seeds))


def nacl(core: Records) -> Claim:
    """NACL's claim, on every task."""
    rows = [left(task, core.samples(task, "nacl", 0.5), core.samples(task, "full"), NACL_LEFT) for task in TASKS]
    return Claim("nacl", "with half of the cache at least 95 % of the score is left", rows)


def keyformer(core: Records) -> Claim:
    """Keyformer's claim against H2O, on every task."""
    rows = [difference(task, core.samples(task, "keyformer", 0.5), core.samples(task, "h2o", 0.5)) for task in TASKS]
    return Claim("keyformer", "above H2O at equal slots (half of the prompt's)", rows)


def kivi(core: Records) -> Claim:
    """KIVI's claim against the full cache, on every task."""
    rows = []
    for task in TASKS:
        ours = core.samples(task, "kivi", key_bits=4, value_bits=4)
        rows.append(difference(task, ours, core.samples(task, "full"), -KIVI_LOST, strict=False))
    return Claim("kivi", f"at 4 bits no more than {KIVI_LOST:g} point of 100 below the full cache", rows)


def qfilters() -> Iterator[Callable[[Records], Claim]]:
    """Against StreamingLLM at the same rates, as it is and with two layers whole, and then at the same bytes."""
    yield partial(needles, [], "")
    yield partial(needles, [0, 1], ", with the first two layers left whole")
    yield needles_at_equal_bytes


def needles(skip: list[int], said: str, records: Records) -> Claim:
    """Q-Filters against StreamingLLM at the same rates. skip: layers left whole.  said: behind the claim."""
    rows = []
    for protocol in PROTOCOLS:
        for rate in RATES:
            theirs = records.samples("needle-mini", "streaming_llm", 1 / rate, protocol)
            ours = records.samples("needle-mini", "qfilters", 1 / rate, protocol, **({"skip": skip} if skip else {}))
            rows.append(difference(f"{rate}x, {protocol}", ours, theirs))
    return Claim("qfilters", f"above StreamingLLM on needles at 8x to 32x{said}", rows)


def needles_at_equal_bytes(records: Records) -> Claim:
    """Q-Filters at its lowest rate against StreamingLLM at the budget that holds as many bytes."""
    rows = []
    for protocol in PROTOCOLS:
        theirs = records.samples("needle-mini", "streaming_llm", LEFT_WHOLE, protocol)
        ours = records.samples("needle-mini", "qfilters", 1 / RATES[0], protocol, skip=[0, 1])
        rows.append(difference(f"{ours.bytes / theirs.bytes:.2f} of its bytes, {protocol}", ours, theirs))
    return Claim("qfilters", "the same against StreamingLLM at equal bytes (two layers whole, two at 8x)", rows)


def kvtuner(method: str, mode: str, records: Records) -> Claim:
    """Searched tables against the same bits everywhere, on samples that the search has not seen.

    Of the tables as small as KV4 or KV2 the one that the search scored best is taken. It dominates where it scores no
    less with fewer bytes, or more with as many.
    """
    folder = ASSETS / "kvtuner" / "reference" / mode
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    everything = records.samples("reasoning-mini", "full")
    unseen = set(everything.seeds[0].index) - set(card["samples"])
    rows = []
    for bits in (4, 2):
        alike = records.samples("reasoning-mini", method, key_bits=bits, value_bits=bits).only(unseen)
        candidates = []
        for entry in card["tables"]:
            if len(set(entry["table"].split())) == 1:  # all layers alike, and no find of the search
                continue
            ours = records.samples("reasoning-mini", method, table=entry["name"]).only(unseen)
            if ours.bytes <= (1 + SAME_BYTES) * alike.bytes:
                candidates.append((entry["score"], -ours.bytes, entry["name"], ours))
        if candidates:
            _, _, name, ours = max(candidates, key=lambda one: one[:2])
            part = ours.bytes / alike.bytes
            what = f"{name} with {part:.2f} of the bytes of KV{bits}"
            rows.append(difference(what, ours, alike, strict=part > 1 - SAME_BYTES))
        else:
            score = both(alike, everything.only(unseen))[0][0] * alike.metric["scale"]
            rows.append(Row(f"no other table as small as KV{bits}, which scores", score, score, score,
                            alike.metric["unit"], len(unseen), NOT_HELD))  # fmt: skip
    said = {"kivi": "keys per channel", "per_token": "per token"}[mode]
    return Claim(method, f"a searched table dominates KV4 and KV2 at no more bytes ({said}; unseen samples)", rows)


def lococo(model: str = "reference") -> Claim:
    """As the artefacts' cards have it: held-out perplexity at equal slots. model: the folder of its cards."""
    rows = []
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in (ASSETS / "lococo" / model).glob("*.json")]
    for card in sorted(cards, key=lambda card: card["slots"]):
        for text, measured in card["held_out"].items():
            for baseline, (value, low, high) in measured["gain"].items():
                what = f"{card['slots']} slots against {baseline}, {text}"
                said = verdict(stats.Estimate(value, low, high))
                rows.append(Row(what, value, low, high, "nats per token", measured["rows"], said))
    return Claim("lococo", "fused slots predict held-out text better than dropping at equal slots", rows)


def sweeps() -> list[list[str]]:
    """The overrides of what is run besides the core table."""
    rates = ",".join(f"{1 / rate:g}" for rate in RATES)
    needle = ["task=needle", f"protocol={','.join(PROTOCOLS)}"]
    commands = [
        [*needle, "method=streaming_llm", f"budget={rates},{LEFT_WHOLE:g}"],
        [*needle, "method=qfilters", f"budget={rates}", "method.skip=[],[0,1]"],
    ]
    commands += [
        ["task=reasoning", f"method={method}", "method.bits=8,4,2"] for method in ("kvtuner", "kvtuner_per_token")
    ]
    return commands + searched("task=reasoning")


def show(claim: Claim) -> None:
    """Print a claim and what was measured for it."""
    print(f"\n{claim.method}: {claim.claim}")
    for row in claim.rows:
        seeds = f", {row.seeds} seeds" if row.seeds > 1 else ""
        print(f"  {row.what}: {row.value:.3f} ({row.low:.3f} to {row.high:.3f}) {row.unit}{seeds}: {row.verdict}")


def gather(folder: Path, makers: Sequence[Callable[[Records], Claim]]) -> tuple[list[Claim | None], Results | None]:
    """The claims that the folder's records can test, None for those they cannot; what is missing is named."""
    claims: list[Claim | None] = []
    try:
        results = load_results(folder)
    except NothingToRead as error:
        print(f"claims: {error}", file=sys.stderr)
        return [None] * len(makers), None
    for make in makers:
        try:
            claims.append(make(Records(results)))
        except NothingToRead as error:
            print(f"claims: {error}", file=sys.stderr)
            claims.append(None)
    return claims, results


def main() -> int:
    """The exit code: 0; 1 if a claim was left out; 2 if nothing could be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=Path, default=HOME / "outputs" / "core", help="records of the core table")
    parser.add_argument("--results", type=Path, default=HOME / "outputs" / "claims", help="records of these claims")
    parser.add_argument("--as-is", action="store_true", help="run nothing, take the records that are there")
    parser.add_argument("overrides", nargs="*", help="for run.py, such as task.limit=2")
    given = parser.parse_args()
    for sweep in () if given.as_is else sweeps():
        run = [sys.executable, "run.py", "-m", "model=reference", *sweep, f"results={given.results}", *given.overrides]
        if (code := subprocess.run(run, cwd=HOME, check=False).returncode) < 0:  # a signal, such as Ctrl-C's
            return code
    tuned = [partial(kvtuner, "kvtuner", "kivi"), partial(kvtuner, "kvtuner_per_token", "per_token")]
    parts = [gather(given.core, [nacl, keyformer, kivi]), gather(given.results, [*qfilters(), *tuned])]
    cells = [part.cells for _, part in parts if part]
    if not cells:
        return 2
    claims = [claim for read, _ in parts for claim in read if claim] + [lococo()]
    left_out = any(claim is None for read, _ in parts for claim in read)
    for claim in claims:
        show(claim)
    book = {
        "command": " ".join(["python benchmarks/claims.py", *given.overrides]),
        "commits": sorted({commit for of in cells for commit in of["commit"]}),
        "weights": sorted({weights for of in cells for weights in of["weights"]}),
        "claims": [asdict(claim) for claim in claims],
    }
    (HOME / "benchmarks" / "results" / "claims.json").write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")
    code = subprocess.run([sys.executable, "-m", "analysis.tables", "--pages"], cwd=HOME, check=False).returncode
    return code or int(left_out)


if __name__ == "__main__":
    sys.exit(main())
