"""docs/architectures.md says what becomes of an architecture: one per class of attention always, all in `test-all`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from benchmarks.architectures import PAGE, SECTIONS, Outcome, entries, outcome, page
from methods.core.binding import self_check

#: one architecture per row of what is equal and what is refused, the quickest
ONE_EACH = (
    "bloom",
    "diffllama",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma4_unified_text",
    "gpt2",
    "gpt_bigcode",
    "granite_swa",
    "llama4_text",
    "mistral",
    "moshi",
    "mpt",
    "nemotron_h",
    "trocr",
    "vaultgemma",
    "vision-encoder-decoder",
    "xlm",
    "xlm-roberta",
    "youtu",
)


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own for what has passed, and a process that remembers nothing."""
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path))
    self_check._passed.cache_clear()


def written() -> dict[str, Outcome]:
    """What the page says of each architecture."""
    found, verdicts = {}, {title: verdict for verdict, (title, _) in SECTIONS.items()}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for row, names in re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE)[1:]:
            found |= {name: Outcome(name, verdicts[title], row) for name in names.split(", ")}
    return found


WRITTEN = written()
SAME_VERSION = f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8")


def agrees(found: Outcome) -> None:
    """Another version of transformers may decide otherwise; that `outcome` returns says that it was decided."""
    if SAME_VERSION and WRITTEN[found.name].verdict != "none":  # of those the page claims nothing
        assert found == WRITTEN[found.name]


@pytest.mark.parametrize("name", ONE_EACH)
def test_one_architecture_of_each_class_of_attention_is_equal_or_refused_as_the_page_says(name):
    agrees(outcome(name))


def test_there_is_one_of_each_class_of_attention():
    classes = {(one.verdict, one.row) for one in WRITTEN.values() if one.verdict in ("equal", "refused")}
    assert sorted((WRITTEN[name].verdict, WRITTEN[name].row) for name in ONE_EACH) == sorted(classes)


@pytest.mark.skipif(not SAME_VERSION, reason="the page is of another version of transformers")
def test_the_page_is_what_the_script_writes_of_every_entry_of_the_mappings():
    assert sorted(WRITTEN) == entries()
    assert page(WRITTEN.values()) == PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", entries())
def test_every_architecture_is_equal_or_refused_as_the_page_says(name):
    agrees(outcome(name))
