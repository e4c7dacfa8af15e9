"""Every method on a pretrained model, SmolLM2-135M-Instruct: `KVFRONTIER_DATA=DIR python benchmarks/real.py`.

Pieces in the order below, each one command whose cells read every prompt together; what is on disk is not run again, so
that the same command goes on where --hours, Ctrl-C or a kill ended it. Then results/real.json, real.parquet and
real-claims.json, with the pieces that are there, the picture and the tables in docs/results-smollm2.md. Published texts
are read from KVFRONTIER_DATA; a piece whose texts are not there is named and left out. `make model` brings the model.
Methods that need an artefact of the model (filters, tables, compressors) join once `--prepare` has made it.

    python benchmarks/real.py --hours 2
    python benchmarks/real.py --only perplexity,needle
    python benchmarks/real.py --as-is      # run nothing, make the table of what is there
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOME))  # run as a file, only its own folder would be on the path

from analysis.load import NothingToRead, load_results  # noqa: E402
from analysis.tables import OPEN  # noqa: E402
from benchmarks.claims import KIVI_LOST, NACL_LEFT, Claim, Records, Row, Scores, difference, left, lococo  # noqa: E402
from runners.jobs import quote  # noqa: E402

MODEL = "smollm2-135m"
ARTEFACTS = "SmolLM2-135M-Instruct*"  # the model's folders in assets/<method>, by the checkpoint's name
ENOUGH = 250  # samples behind a verdict; of fewer the interval is shown alone
BUDGETS = (0.7, 0.5, 0.2, 0.1)
BITS = {"kivi": (8, 4, 2), "per_token": (8, 4, 2)}
SIZES = {"lococo": (256, 128)}
SAME = ("recency", "hindsight")  # with nothing pinned the one keeps what window keeps; the other answers twice
#: methods that learn something of the model first, by whose name it lies in assets, and there the files of it
LEARNED = {
    "qfilters": "qfilters", "qfilters_capped": "qfilters", "lococo": "lococo", "kvtuner": "kvtuner",
    "kvtuner_per_token": "kvtuner",
}  # fmt: skip
PATTERNS = {"qfilters": "*.safetensors", "lococo": "*.safetensors", "kvtuner": "*/*.yaml"}
TABLES = {"kvtuner": "kivi", "kvtuner_per_token": "per_token"}
#: makes what methods need of the model, in that order
PREPARE = (
    ["runner=calibrate", "method=qfilters"],
    ["runner=tune", "method=kvtuner"],
    ["runner=tune", "method=kvtuner_per_token"],
    ["runner=train", "method=lococo", "budget=256"],
    ["runner=train", "method=lococo", "budget=128"],
)
#: two bytes a number, as such models are served
CACHE = ["cache.dtype=float16", "fidelity=off"]
#: by name: the published file or folder that it needs, and the overrides of the command, {data} standing for it
PIECES: dict[str, tuple[str, list[str]]] = {
    "perplexity": (
        "wikitext-2/test.txt",
        ["task=perplexity", "task.data={data}", "task.length=1024", "task.prompt=1008", "task.limit=250",
         "batch_size=8"],
    ),
    **{
        f"needle-{length}": (
            "",
            ["task=needle", "task.data=real", "task.kinds=[single,passkey]", f"task.lengths=[{length}]",
             f"task.repeats={repeats}"],
        )
        for length, repeats in ((1024, 12), (2048, 1), (4096, 1), (7500, 1))
    },
    "ruler": (
        "",
        ["task=ruler", "task.data=assets/needle-real", "task.subset=[niah_single_1,niah_single_2,niah_multikey_1]",
         "task.lengths=[1024]", "task.samples=20"],
    ),
    "longbench-real": ("", ["task=longbench", "task.data=real", "task.subset=profile_qa"]),
    # its answers begin with the word that decides, which would come from the exact prompt
    "region": ("", ["task=longbench", "task.data=real", "task.subset=region", "last_token=held"]),
    "fewshot-real": ("", ["task=lm_eval", "task.data=real"]),
    "ppl-real": ("", ["task=perplexity", "task.data=real", "task.length=900", "task.prompt=868", "batch_size=8"]),
    "summaries": (
        "summarization",
        ["task=summarization", "task.data={data}", "task.limit=20", "task.max_new_tokens=64"],
    ),
    "choices": (
        "multiple-choice",
        ["task=lm_eval", "task.data={data}", "task.tasks=[piqa,copa,openbookqa]", "task.shots=5", "task.limit=50"],
    ),
}  # fmt: skip
#: of which pieces the claims that fail are looked into, by cells of their own in a folder of their own
WHY = ("needle-1024", "longbench-real")
#: NACL with fewer proxies and without its draws, Keyformer without its noise and with less room for the newest, and at
#: the same budgets the same votes counted over all queries (H2O) and over the last ones (SnapKV)
ABLATED = (
    ["method=nacl", "budget=0.5"],
    ["method=nacl", "budget=0.5", "method.by_chance=0", "method.by_score=0.9"],
    ["method=nacl", "budget=0.5", "method.proxy=0.03"],
    ["method=nacl", "budget=0.5", "method.proxy=0.03", "method.by_chance=0", "method.by_score=0.9"],
    ["method=keyformer", "budget=0.7"],
    ["method=keyformer", "budget=0.7", "method.noise=none"],
    ["method=keyformer", "budget=0.7", "method.recent=0.1"],
    *([f"method={name}", f"budget={budget}"] for budget in (0.7, 0.5) for name in ("h2o", "snapkv")),
)


def cells() -> Iterator[list[str]]:
    """The overrides of every cell: slots at each budget, codecs at their bits or searched tables.

    One seed for all: what is drawn is drawn anew for every sample, so that the interval over samples has it in it.
    """
    for path in sorted((HOME / "conf" / "method").glob("*.yaml")):
        name = path.stem
        if name in ("full", *SAME) or (name in LEARNED and not made(name)):
            continue
        if name == "no_context":  # the floor, at no budget
            yield [f"method={name}"]
        elif name in BITS:
            yield from ([f"method={name}", f"method.bits={bits}"] for bits in BITS[name])
        elif name in TABLES:
            yield from ([f"method={name}", f"method.table={table.stem}"] for table in made(name))
        else:
            yield from ([f"method={name}", f"budget={budget}"] for budget in SIZES.get(name, BUDGETS))


def made(method: str) -> list[Path]:
    """What is in the tree of what the method learned of the model."""
    found = sorted((HOME / "assets" / LEARNED[method]).glob(f"{ARTEFACTS}/{PATTERNS[LEARNED[method]]}"))
    return [path for path in found if method not in TABLES or path.parent.name == TABLES[method]]


def command(piece: str, results: Path, given: Iterable[list[str]] | None = None) -> list[str] | None:
    """The overrides of a piece's command; None where its texts are not there, which is said.

    given: its cells; None: those of all methods.
    """
    needs, words = PIECES[piece]
    data = Path(os.environ.get("KVFRONTIER_DATA", "")) / needs
    if needs and not ("KVFRONTIER_DATA" in os.environ and data.exists()):
        print(f"{piece}: not run, it needs {needs} of the published data (KVFRONTIER_DATA)", file=sys.stderr)
        return None
    grid = ",".join(quote(" ".join(cell)) for cell in (cells() if given is None else given))
    named = [word.replace("{data}", str(data)) for word in words]
    return [f"model={MODEL}", *CACHE, *named, f"results={results}", f"cells=[{grid}]"]


def run(words: list[str], until: float) -> int:
    """Run one command, and end it as Ctrl-C does when the time is up; its exit code, 130 then."""
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=HOME)
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGINT)
        process.wait()
        return 130


def why(results: Path) -> Path:
    """The folder of the cells that look into what fails."""
    return results.with_name(f"{results.name}-why")


def table(results: Path, said: str) -> int:
    """Write the tables, claims, picture and page of what the records have; the exit code of what failed."""
    claims(results)
    looked_into = ["analysis.tables", str(why(results)), "--name", "real-why", "--command", f"{said} --why"]
    for module in (
        *([looked_into] if why(results).is_dir() else []),
        ["analysis.tables", str(results), "--name", "real", "--command", said, "--pages"],
        ["analysis.frontier", str(results), "--out", str(results)],
    ):
        if code := subprocess.run([sys.executable, "-m", *module], cwd=HOME, check=False).returncode:
            return code
    (HOME / "benchmarks" / "results" / "real.png").write_bytes((results / "frontier.png").read_bytes())
    return 0


def by_length(what: str, ours: Scores, theirs: Scores) -> Iterator[tuple[str, tuple[Scores, Scores]]]:
    """Two cells' samples, apart by their lengths where these are tagged and differ; what: said of them."""
    table = ours.seeds[0]
    lengths = sorted(table["length"].dropna().unique())
    if len(lengths) < 2:
        yield what, (ours, theirs)
        return
    for length in lengths:
        ids = set(table.index[table["length"] == length])
        yield f"{what}, {length:,.0f} tokens", (ours.only(ids), theirs.only(ids))


def _scores(full: Scores) -> bool:
    """Whether a full cache scores anything, of which a share could be left."""
    return any(seed["score"].any() for seed in full.seeds)


def about(records: Records, tasks: Sequence[str]) -> Iterator[Callable[[], Claim]]:
    """The papers' claims, each over the tasks that have been run; perplexity is compared, and has no share left."""
    better = {task: records.samples(task, "full").metric["better"] for task in tasks}
    points = [task for task in tasks if better[task] == "higher"]

    def left_of(method: str, budget: float, least: float, said: str) -> Claim:
        rows = []
        for task in points:
            pair = records.samples(task, method, budget), records.samples(task, "full")
            rows += [left(what, *both, least) for what, both in by_length(task, *pair) if _scores(both[1])]
        return Claim(method, said, rows)

    def beside(what: str, ours: Scores, theirs: Scores, border: float = 0.0, strict: bool = True) -> list[Row]:
        return [difference(part, *both, border, strict) for part, both in by_length(what, ours, theirs)]

    def against() -> Iterator[Row]:
        for task in tasks:
            for budget in BUDGETS if better[task] == "lower" or task.startswith("needle") else ():
                ours = records.samples(task, "qfilters", budget)
                yield from beside(f"{task} at {budget:g}", ours, records.samples(task, "streaming_llm", budget))

    def packed() -> Iterator[Row]:
        for task in points:
            ours = records.samples(task, "kivi", key_bits=4, value_bits=4)
            yield from beside(task, ours, records.samples(task, "full"), -KIVI_LOST, strict=False)

    def tuned(mode: str, method: str) -> Claim:
        rows = []
        for task in points:
            full = records.samples(task, "full")
            for table in sorted((HOME / "assets" / "kvtuner").glob(f"{ARTEFACTS}/{mode}/*.yaml")):
                ours = records.samples(task, method, table=table.stem)
                rows += beside(f"{task}, {table.stem} bits", ours, full, -KIVI_LOST, strict=False)
        said = f"searched tables of bits: no more than {KIVI_LOST:g} point of 100 below the full cache ({mode})"
        return Claim(method, said, rows)

    yield lambda: left_of("nacl", 0.5, NACL_LEFT, "with half of the cache at least 95 % of the score is left")
    yield lambda: left_of("keyformer", 0.7, 0.99, "with 70 % of the cache at least 99 % of the score is left")
    yield lambda: Claim("qfilters", "above StreamingLLM in perplexity and on needles", [*against()])
    yield partial(tuned, "kivi", "kvtuner")
    yield partial(tuned, "per_token", "kvtuner_per_token")
    yield from (partial(lococo, folder.name) for folder in sorted((HOME / "assets" / "lococo").glob(ARTEFACTS)))
    yield lambda: Claim("kivi", f"at 4 bits no more than {KIVI_LOST:g} point of 100 below the full cache", [*packed()])


def told(claim: Claim) -> Claim:
    """The claim without the verdicts that rest on too few samples."""
    return replace(claim, rows=[row if row.n >= ENOUGH else replace(row, verdict=OPEN) for row in claim.rows])


def claims(results: Path) -> None:
    """Write what the records say of the papers' claims; those that they cannot test are named."""
    read = load_results(results)
    records, found = Records(read, seeds=1), []
    for make in about(records, sorted(set(read.cells["task"]))):
        try:
            if (claim := told(make())).rows:
                found.append(claim)
            else:
                print(f"claims: {claim.method}: no task that tests it has been run", file=sys.stderr)
        except NothingToRead as error:
            print(f"claims: {error}", file=sys.stderr)
    book = {
        "command": "python benchmarks/real.py",
        "commits": sorted(set(read.cells["commit"])),
        "weights": sorted(set(read.cells["weights"])),
        "claims": [asdict(claim) for claim in found],
    }
    path = HOME / "benchmarks" / "results" / "real-claims.json"
    path.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The exit code: of the last command that could not run, 130 when the time was up, or of making the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HOME / "outputs" / "real", help="folder of the records")
    parser.add_argument("--only", metavar="PIECES", help=f"some of {', '.join(PIECES)}")
    parser.add_argument("--hours", type=float, default=12.0, help="end after so many (default: 12)")
    parser.add_argument("--prepare", action="store_true", help="first make the artefacts that methods need")
    parser.add_argument("--why", action="store_true", help="instead look into the claims that fail, by ablations")
    parser.add_argument("--as-is", action="store_true", help="run nothing, take the records that are there")
    parser.add_argument("overrides", nargs="*", help="for run.py, such as threads=1")
    given = parser.parse_intermixed_args()
    pieces = given.only.split(",") if given.only else list(WHY if given.why else PIECES)
    if unknown := [piece for piece in pieces if piece not in PIECES]:
        parser.error(f"--only {','.join(unknown)}: give some of {', '.join(PIECES)}")
    until, refused, results = time.monotonic() + 3600 * given.hours, 0, given.results.resolve()
    commands = [[f"model={MODEL}", *words] for words in PREPARE] if given.prepare else []
    if not given.as_is:
        asked = (why(results), ABLATED) if given.why else (results, None)
        commands += [words for piece in pieces if (words := command(piece, *asked))]
    for words in commands:
        code = run([*words, *given.overrides], until)
        if code == 130:
            break
        refused = code if code > 1 else refused
    else:
        code = refused
    return table(results, "python benchmarks/real.py") or code


if __name__ == "__main__":
    sys.exit(main())
