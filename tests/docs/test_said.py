"""What pages say of the code: names, error lines, commands and the examples of the README."""

import inspect
import re
import shlex
import sys

import pytest
import torch
from transformers import GenerationConfig

from methods import method_names
from methods.core import allocate, capped, contract, eviction, store
from methods.core.selecting.layer import SelectiveCache
from methods.core.selecting.method import Selective
from methods.core.stores.counted import Counted
from runners.settings.check import check_config
from runners.settings.trainers import for_trainer
from runners.settings.words import read as setting
from tests.docs.pages import PAGES, README, ROOT, blocks, read, rows, without_blocks
from tests.tiny import tiny_model
from tests.wrong.values import composed

CONTRACT = ROOT / "docs" / "contract.md"
#: headings of docs/contract.md, and the classes whose names stand below them
CLASSES = {
    "Method": contract.Method,
    "ModelSpec": contract.ModelSpec,
    "LayerCache": contract.LayerCache,
    "Step": contract.Step,
    "Store": store.Store,
    "Eviction": eviction.Eviction,
    "What a score sees": eviction.EvictionContext,
    "Eviction that goes on while decoding": capped.Capped,
    "Allocator": allocate.Allocator,
    "Selection": Selective,
    "What a selecting layer fills in": SelectiveCache,
}
#: where a command's own words go: it cannot be given as it stands, or not in this checkout
PLACES = ("NAME", "...", "keepnorm", "task=facts")


def section(text: str, heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert found, f"no heading {heading}"
    return found[1]


def own_names(kind: type) -> set[str]:
    """Public names that a class itself gives: fields, class variables, functions and properties; a store's accounts."""
    parts = [kind, Counted] if kind is store.Store else [kind]
    names = {name for part in parts for name in (*vars(part), *inspect.get_annotations(part))}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("heading", CLASSES)
def test_the_contracts_page_has_every_name_of_the_class_and_no_other(heading):
    kind = CLASSES[heading]
    told = {name for row in rows(section(read(CONTRACT), heading)) for name in re.findall(r"`(\w+)", row[0])}
    told -= {stage.name for stage in contract.Stage}
    inherited = set().union(*(own_names(base) for base in kind.__mro__[1:] if base is not Counted))
    assert told <= own_names(kind) | inherited
    assert own_names(kind) - inherited <= told


def test_the_contracts_page_has_every_stage():
    told = re.findall(r"^\| `([A-Z_]+)` \|", section(read(CONTRACT), "Step"), re.M)
    assert told == [stage.name for stage in contract.Stage]


def test_every_term_of_the_glossary_is_defined_once():
    terms = re.findall(r"^\*\*(.+?)\.\*\* ", read(ROOT / "docs" / "glossary.md"), re.M)
    assert len(terms) == len(set(terms))
    kept = (
        "Token, Slot, Position, Prompt, Prefill, Decode, Turn, Observation window, Residual window, Sink, Budget, "
        "Share, Held bytes, Read bytes, Moved bytes, Ledger, Cell, Sweep, Record, Protocol, Accumulated attention, "
        "Page, Artefact, Reference model, Full cache"
    )
    assert set(kept.split(", ")) <= set(terms)


def texts_of_the_code() -> str:
    """The sources, texts over several lines joined and what is filled into them an ellipsis."""
    folders = ("methods", "runners", "tasks", "analysis", "hydra_plugins")
    paths = [ROOT / "setup", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(map(read, paths)))
    return re.sub(r"{[^{}\n]*}", "…", joined)


def lines_told() -> list[str]:
    """The lines that docs/troubleshooting.md explains."""
    page = read(ROOT / "docs" / "troubleshooting.md")
    heads = re.findall(r"^- ((?:`[^`]+`(?:,\s+)?)+):", page, re.M)
    return [line for head in heads for line in re.findall(r"`([^`]+)`", head)]


def test_every_line_that_troubleshooting_explains_is_said_somewhere():
    lines = lines_told()
    assert len(lines) >= 20
    longest, code = {line: max(line.split("…"), key=len) for line in lines}, texts_of_the_code()
    assert [line for line, part in longest.items() if part not in code] == []
    assert "no such line is said…" not in code


def commands() -> list[tuple[str, str]]:
    """(page, command) of every command of the pages."""
    found = []
    for page in (p for p in PAGES if p.name != "CHANGELOG.md"):
        text = read(page)
        inside = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
        within = re.findall(r"`(python [^`]+|make [^`]+)`", without_blocks(text))
        for line in [*inside, *(" ".join(one.split()) for one in within)]:
            if re.match(r"(python|make) ", line) and not any(place in line for place in PLACES):
                found.append((page.name, line.strip()))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_pages_can_be_given(page, line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^(\w[\w-]*):", read(ROOT / "Makefile"), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[1] == "run.py":
        check_config(composed(*settings(for_trainer(words[2:]))))
    elif words[1] != "-c":
        path = ROOT / words[1] if words[1] != "-m" else ROOT.joinpath(*words[2].split("."))
        main = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        flags = [word for word in words[2:] if word.startswith("--")]
        assert main.is_file() and [flag for flag in flags if f'"{flag}"' not in read(main)] == []


def settings(words: list[str]) -> list[str]:
    """A command's settings, of each sweep the first value; what only the sweeper reads is left out."""
    found = []
    for word in words:
        if word.startswith("-") or word == "budget=sweep":
            continue
        one = setting(word)
        if one.is_sweep_override():
            if "glob(" in word:
                continue
            word = f"{one.key_or_group}={next(iter(one.sweep_string_iterator()))}"
        found.append(word)
    return found


def test_a_command_that_cannot_be_given_is_found():
    for line in ("make nothing", "python run.py method=none", "python run.py task.nothing=1",
                 "python benchmarks/none.py", "python -m analysis.frontier results --nothing"):  # fmt: skip
        with pytest.raises(Exception):  # noqa: B017
            test_a_command_of_the_pages_can_be_given("a page", line)


def test_what_the_readme_names_is_there():
    text = read(README)
    methods = re.findall(r"`([\w+]+)`", " ".join(row[1] for row in rows(section(text, "Methods"))))
    assert len(methods) >= 10 and set(methods) <= set(method_names())
    tasks, models = section(text, "Tasks and models").strip().split("\n\n")[:2]
    conf = ROOT / "conf"
    assert set(re.findall(r"`(\w+)`", tasks)) <= {path.stem for path in (conf / "task").glob("*.yaml")}
    named = set(re.findall(r"`(?:model=)?([\w.-]+)`", models))
    assert len(named) >= 5 and named <= {path.stem for path in (conf / "model").glob("*.yaml")}
    layout = re.findall(r"^(\w[\w.]*?)/? {2,}", blocks(section(text, "Layout"))[0], re.M)
    assert len(layout) >= 10 and all((ROOT / name).exists() for name in layout)


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama")
    made.generation_config = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    return made


@pytest.fixture
def inputs():
    ids = torch.arange(1, 65)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_readmes_three_lines_generate_over_a_smaller_cache(model, inputs):
    names = {"model": model, "inputs": inputs}
    code = blocks(section(read(README), "As a library"), "python")[0]
    assert len([line for line in code.splitlines() if line]) == 3
    exec(code, names)
    assert 0.2 < names["cache"].report().share < 0.6  # SnapKV's window is half of so short a prompt


def test_the_readmes_ten_lines_are_a_method_that_drops_what_it_says(model, inputs, monkeypatch):
    code = blocks(section(read(README), "A method in ten lines"), "python")[0]
    assert len([line for line in code.splitlines() if line]) == 10
    module = type(sys)("readme_method")
    monkeypatch.setitem(sys.modules, "readme_method", module)
    exec(code, module.__dict__)
    cache = module.KeepNorm(budget=0.25, recent=4).cache_for(model)
    model.generate(**inputs, past_key_values=cache)
    pos = cache.layers[0].inner.store.pos  # [1, H, S]
    assert 0.2 < cache.report().share < 0.3  # the request, and what its positions take
    assert all({60, 61, 62, 63} <= set(head.tolist()) for head in pos[0])
    whole = module.KeepNorm(budget=1.0).cache_for(model)
    assert model.generate(**inputs, past_key_values=whole).tolist() == model.generate(**inputs).tolist()
