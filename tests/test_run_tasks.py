"""Perplexity, several turns, reasoning, word problems and summaries from the command line, on a tiny random model."""

import json
from functools import partial
from pathlib import Path

import pytest

import run

TEXT = "the cat sat on a mat and read about a long river in the north where nobody answers questions. "


@pytest.fixture
def command(tmp_path, tiny_model_dir, run_command):
    """The command line on the tiny model: command("task=...", ...) -> (exit code, stdout, stderr)."""
    return partial(run_command, f"model.path={tiny_model_dir}", f"results={tmp_path / 'results'}")


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"task.data={path}"


def recorded(tmp_path: Path, method: str) -> list[dict]:
    (path,) = (tmp_path / "results").glob(f"*/*/{method}-b*/samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


SNAPKV = ("method=snapkv", "budget=0.25", "method.window=8")


def test_perplexity_prints_nats_and_which_way_is_better(command, tmp_path):
    data = write(tmp_path / "texts.jsonl", {"text": TEXT * 12}, {"text": TEXT.upper() * 3})
    code, out, err = command("task=perplexity", data, "task.length=100", "task.stride=8", "task.limit=2", *SNAPKV)
    assert code == 0, err
    assert "nats per token, lower is better" in out and "perplexity of texts" in out
    ours, full = recorded(tmp_path, "snapkv"), recorded(tmp_path, "full")
    assert [row["counted"] for row in ours] == [row["counted"] for row in full] == [25, 25]
    assert all(a["score"] != b["score"] and b["score"] > 1 for a, b in zip(ours, full))
    cell = json.loads(next((tmp_path / "results").glob("*/*/snapkv-b*/cell.json")).read_text())
    assert cell["identity"]["task"]["metric"]["better"] == "lower"


def test_one_pass_is_refused_for_a_cache_method_with_the_reason_and_runs_for_the_full_cache(command, tmp_path):
    data = write(tmp_path / "texts.jsonl", {"text": TEXT * 6})
    code, _, err = command("task=perplexity", data, "task.length=60", "task.through=windows", *SNAPKV)
    assert code == 2 and "before anything is dropped" in err
    code, out, _ = command("task=perplexity", data, "task.length=60", "task.through=windows", "method=full")
    assert code == 0 and "perplexity of texts" in out


def test_a_cap_is_a_number_of_slots(command, tmp_path):
    data = write(tmp_path / "texts.jsonl", {"text": TEXT * 6})
    code, _, err = command("task=perplexity", data, "task.through=stream", "method=streaming_llm", "budget=0.5")
    assert code == 2 and "budget=0.5" in err
    more = ("task.length=60", "method=streaming_llm", "budget=16")
    code, out, err = command("task=perplexity", data, "task.through=stream", *more)
    assert code == 0 and "perplexity of texts" in out, err
    more = ("task.length=60", "task.stride=12", "method=h2o", "budget=16")
    code, out, err = command("task=perplexity", data, "task.through=chunk", *more)
    assert code == 0 and "through=chunk" in out and "perplexity of texts" in out, err


@pytest.mark.parametrize(("through", "groups"), [("stream", 2), ("chunk", 2), ("prefix", 1)])
def test_a_sweep_over_caps_has_a_group_per_cap(command, tmp_path, through, groups):
    data = write(tmp_path / "texts.jsonl", {"text": TEXT * 6})
    more = ("task.length=60", "task.stride=6", f"task.through={through}")
    code, out, err = command("-m", "task=perplexity", data, *more, "method=h2o,streaming_llm", "budget=16,24")
    assert code == 0, err
    assert out.count("nats per token") == groups
    cells = [json.loads(path.read_text())["identity"] for path in (tmp_path / "results").glob("*/*/*/cell.json")]
    if through != "prefix":
        caps = sorted((cell["method"]["name"], cell["task"]["fingerprint"]["cap"]) for cell in cells)
        assert caps == [(name, cap) for name in ("full", "h2o", "streaming_llm") for cap in (16, 24)]
        assert all(cell["budget"] in (1, cell["task"]["fingerprint"]["cap"]) for cell in cells)


def test_a_sweep_shows_every_text_where_there_is_no_average(command, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        write(tmp_path / "texts" / f"{name}.jsonl", {"text": TEXT * 6})
    data = f"task.data={tmp_path / 'texts'}"
    code, out, err = command("-m", "task=perplexity", data, "task.length=60", "method=snapkv", "budget=0.5")
    assert code == 0, err
    lines = [line.split()[:3] for line in out[: out.index("KV bytes:")].splitlines()]
    assert [line for line in lines if line[:1] in (["full"], ["snapkv"])] == [
        ["full", "1", "one"], ["full", "1", "two"], ["snapkv", "0.5", "one"], ["snapkv", "0.5", "two"],
    ]  # fmt: skip


def test_turns_and_requests_have_their_tables(command, tmp_path):
    turns = [{"input": "where is the mat?", "answer": " here."}, {"input": "who sat?", "answer": " the cat."}]
    data = write(tmp_path / "kept.jsonl", {"context": TEXT * 2, "multi_turns": turns, "max_new_tokens": 4})
    code, out, err = command("task=multiturn", data, *SNAPKV)
    assert code == 0 and "kept turn 1" in out and "kept, first turn to last" in out, err
    (row,) = recorded(tmp_path, "snapkv")
    assert len(row["turns"]) == 2 and row["turns"][0]["held"] < row["turns"][1]["held"]
    code, _, err = command("task=multiturn", data, "task.mode=requests", *SNAPKV)
    assert code == 2 and "protocol=query_agnostic" in err
    code, out, _ = command("task=multiturn", data, "task.mode=requests", "protocol=agnostic", *SNAPKV)
    assert code == 0 and "kept turn 1" not in out


def test_reasoning_shows_both_readings(command, tmp_path):
    row = {"context": TEXT * 2, "question": "\n\nwhere?", "steps": " in the north.", "max_new_tokens": 4}
    code, out, err = command("task=reasoning", write(tmp_path / "links.jsonl", row), *SNAPKV)
    assert code == 0 and "links strict" in out and "mean, flexible" in out, err


def test_word_problems_run_from_a_folder_and_the_offline_split_stands_in_for_them(command, tmp_path):
    write(tmp_path / "test.jsonl", {"question": "1 + 1?", "answer": "#### 2"})
    code, out, err = command(
        "task=gsm8k", f"task.data={tmp_path / 'test.jsonl'}", "task.variant=gsm8k_cot", "task.shots=1",
        "task.max_new_tokens=4", *SNAPKV,
    )  # fmt: skip
    assert code == 0 and "gsm8k_cot strict" in out and "no number found" in out, err
    code, out, _ = command("task=gsm8k", "task.limit=1", *SNAPKV)
    assert code == 0 and out.startswith("reasoning-mini (bundled)")


def test_summaries_have_three_kinds_of_rouge_and_a_verdict(command, tmp_path):
    data = write(tmp_path / "news.jsonl", {"article": TEXT * 2, "highlights": "the cat sat."})
    code, out, err = command("task=summarization", data, "task.max_new_tokens=4", *SNAPKV)
    assert code == 0 and "news ROUGE-2" in out and "99 % of the full cache:" in out, err
    code, out, err = command("task=summarization_keyformer", data, "task.beams=2", "task.max_new_tokens=34", *SNAPKV)
    assert code == 0 and "beam 2" in out, err


def test_parts_that_one_of_two_records_lacks_are_named_and_the_others_are_compared(command, tmp_path):
    data = write(tmp_path / "news.jsonl", {"article": TEXT * 2, "highlights": "the cat sat."})
    words = ("task=summarization", data, "task.max_new_tokens=4", *SNAPKV)
    command(*words)
    (path,) = (tmp_path / "results").glob("*/*/full-b*/samples.jsonl")
    row = json.loads(path.read_text())
    del row["parts"]["ROUGE-Lsum"]  # as code wrote it that had no such part
    path.write_text(json.dumps(row) + "\n")
    code, out, err = command(*words)
    assert code == 0 and "news ROUGE-L " in out and "news ROUGE-Lsum " not in out, out
    assert "news ROUGE-Lsum (such as news/0): in one of the two records only" in err and len(err.splitlines()) == 1
    path.write_text(json.dumps({name: value for name, value in row.items() if name != "parts"}) + "\n")
    for grid in ((), ("-m",)):
        code, out, err = command(*grid, *words)
        assert code == 0 and "news ROUGE-1, news ROUGE-2, " in err and "record" in out, err


def test_choices_have_both_accuracies_and_what_moved_below_them(command, tmp_path):
    row = {"context": TEXT * 2, "question": "\n\nwhere?", "choices": ["in the north", "here", "a cat", "on"], "gold": 0}
    (tmp_path / "facts.jsonl").write_text(json.dumps(row) + "\n")
    include = Path(run.__file__).parent / "assets" / "lm_eval-mini"
    more = (f"task.data={tmp_path}", "task.tasks=[facts]", f"task.include={include}")
    code, out, err = command("task=lm_eval", *more, *SNAPKV)
    assert code == 0 and "facts acc_norm" in out and "log-likelihood of the right choice" in out, err
    ours, full = recorded(tmp_path, "snapkv")[0], recorded(tmp_path, "full")[0]
    assert len(ours["likelihoods"]) == 4 and ours["likelihoods"] != full["likelihoods"]
    assert ours["ledger"]["held_prompt"] < 0.4 * full["ledger"]["held_prompt"]


@pytest.mark.parametrize("method", ["h2o", "kivi"])
def test_bundled_choices_run_with_a_method_and_agnostic(command, method):
    code, out, err = command("task=lm_eval", "task.limit=1", "protocol=agnostic", f"method={method}")
    assert code == 0 and out.startswith("lm_eval-mini (bundled): facts (test, 24 items), list"), err
    assert "mean, acc" in out


def test_the_second_longbench_reads_a_letter(command, tmp_path):
    row = {f"choice_{letter}": "the cat" for letter in "ABCD"} | {
        "domain": "Single-Document QA", "sub_domain": "x", "difficulty": "easy", "length": "short", "question": "who?",
        "answer": "A", "context": TEXT * 2,
    }  # fmt: skip
    code, out, err = command("task=longbench_v2", write(tmp_path / "data.jsonl", row), *SNAPKV)
    assert code == 0 and "overall" in out and "no letter found" in out, err


def test_times_are_taken_beside_the_full_cache_and_go_on_from_the_record(command, tmp_path):
    more = ("task=latency", "task.batches=[1,2]", "task.new_tokens=3", "task.rounds=2", *SNAPKV)
    code, out, err = command(*more, "task.lengths=[32]")
    assert code == 0 and out.startswith("latency (random tokens, seed 42), prompts of 32 tokens"), err
    code, out, err = command(*more, "task.lengths=[32,64]")
    assert code == 0 and "against full" in out, err
    rows = recorded(tmp_path, "snapkv")
    assert [row["id"] for row in rows] == ["32x1", "32x2", "64x1", "64x2"]  # the first two were not taken again
    assert all(len(row["times"]["steps"]) == len(row["full_times"]["steps"]) == 2 for row in rows)
    (folder,) = (tmp_path / "results").glob("*/latency/snapkv-b*")
    assert (folder / "latency.png").is_file()
    backend = json.loads((folder / "cell.json").read_text())["runs"][0]["conditions"]["backend"]
    assert backend and f"kernels={backend}" in out
    assert not list((tmp_path / "results").glob("*/latency/full-*"))


def test_a_sweep_of_times_runs_one_cell_after_the_other(command, tmp_path):
    code, out, err = command(
        "-m", "task=latency", "task.lengths=[32]", "task.batches=[1]", "task.new_tokens=3", "task.rounds=1",
        "method=h2o,random", "budget=0.5",
    )  # fmt: skip
    assert code == 0 and "h2o 0.5" in out and "random 0.5" in out, err
    assert "one cell after the other" in err
    assert all("group" not in row for method in ("full", "h2o", "random") for row in recorded(tmp_path, method))


def test_times_of_a_shape_need_no_download(command, tmp_path):
    code, out, err = command(
        "task=latency", "model=llama3.1-8b", "model.path=meta-llama/Llama-3.1-8B-Instruct", "model.init=random",
        "model.resize={num_hidden_layers: 1, vocab_size: 320, hidden_size: 64, intermediate_size: 64, head_dim: 4}",
        "task.lengths=[32]", "task.batches=[1]", "task.new_tokens=3", "task.rounds=1", *SNAPKV,
    )  # fmt: skip
    assert code == 0 and "snapkv 0.25" in out, err
    assert list((tmp_path / "results").glob("Llama-3.1-8B-Instruct-random-*/latency/snapkv-b*"))
    code, _, err = command("task=latency", "task.lengths=[32]", "protocol=agnostic")
    assert code == 2 and "give protocol=query_aware" in err
