"""Times of a method and of the full cache on the same random prompt, on a tiny random model."""

import json
import weakref

import pytest
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from methods import load_method
from methods.core.errors import UserError
from runners.engine import latency
from runners.engine.latency import check_lengths, measure, random_tokens
from runners.report.latency_report import against, curves, draw_latency, latency_table, ratios, read
from tasks.base import Timed
from tasks.latency import Latency

TIMED = Timed(length=40, batch=2, steps=5, rounds=3)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def made(monkeypatch):
    """What was begun and fed, in order: (method, what)."""
    log = []

    class Capture(latency._Running):
        def __init__(self, model, method, prompts, chunk):
            super().__init__(model, method, prompts, chunk)
            self.name = method.name
            log.append((self.name, "prompt"))

        def decode(self, steps):
            log.append((self.name, steps))
            return super().decode(steps)

    monkeypatch.setattr(latency, "_Running", Capture)
    return log


def row(prompts=(0.2, 0.1), steps=(0.02, 0.04), full=((0.1, 0.1), (0.01, 0.01)), length=64, batch=2):
    book = {"held_prompt": 1024, "full_prompt": 4096, "read_step": 1024, "peak_prompt": 2048, "peak_decode": 1024}
    found = {"tokens_in": length, "batch": batch, "ledger": book, "threads": 1, "id": f"{length}x{batch}"}
    found["times"] = {"prompts": list(prompts), "steps": list(steps)}
    return found | ({"full_times": {"prompts": list(full[0]), "steps": list(full[1])}} if full else {})


def test_every_round_times_both_and_the_first_to_read_changes(model, made):
    ours, full = measure(model, [load_method("snapkv", budget=0.25, window=4), load_method("full")], TIMED)
    for times in (ours, full):
        assert len(times.prompts) == len(times.steps) == 3 and min(times.prompts + times.steps) > 0
    reading = [name for name, what in made if what == "prompt"]
    assert len(reading) == 2 * (3 + 1)
    assert [reading[i] for i in (2, 4, 6)] == ["snapkv", "full", "snapkv"]


def test_decoding_takes_turns_step_by_step(model, made):
    measure(model, [load_method("snapkv", budget=0.25, window=4), load_method("full")], Timed(40, 2, 5, rounds=1))
    last = [name for name, what in made[-10:]]
    assert last in (["snapkv", "full"] * 5, ["full", "snapkv"] * 5)
    assert all(what == 1 for _, what in made[-10:])


def test_no_cache_of_a_round_lives_on_into_the_next(model, monkeypatch):
    alive = weakref.WeakSet()
    most = []

    class Counted(latency._Running):
        def __init__(self, *args):
            most.append(len(alive))
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr(latency, "_Running", Counted)
    measure(model, [load_method("snapkv", budget=0.25, window=4), load_method("full")], TIMED)
    assert most == [0, 1] * 4 and not alive


def test_bytes_are_those_of_the_prompt_of_all_rows(model):
    ours, full = measure(model, [load_method("snapkv", budget=0.25, window=4), load_method("full")], TIMED)
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, width, float32
    assert full.ledger.full_prompt == ours.ledger.full_prompt == 2 * 40 * token
    assert full.ledger.full == 2 * (40 + 5) * token
    assert 1 <= full.ledger.share < 1.05 and 0.25 <= ours.ledger.share < 0.3  # positions are held too


def test_the_prompt_is_the_same_for_all_methods_and_follows_the_seed(model):
    rows = random_tokens(model, TIMED)
    assert [len(row) for row in rows] == [40, 40] and rows[0] != rows[1]
    assert rows == random_tokens(model, TIMED)
    assert rows != random_tokens(model, Timed(40, 2, 5, 3, seed=1))
    assert max(max(row) for row in rows) < model.config.vocab_size


def test_a_prompt_that_the_model_has_no_positions_for_is_refused_beforehand():
    examples = Latency(lengths=[90, 100], new_tokens=8).examples()
    check_lengths(examples, None)
    check_lengths(examples, 108)
    with pytest.raises(UserError, match=r"task.lengths=100: .* give 99 or less"):
        check_lengths(examples, 107)


def test_ratios_are_formed_inside_a_round():
    assert ratios(row(), "steps") == [2.0, 4.0]
    assert against(row(), "prompts") == "1.50 (1.00 to 2.00)"
    assert against(row(full=None), "prompts") == "-"


def test_the_table_has_tokens_per_second_of_all_rows():
    shown = latency_table([("snapkv 0.25", [row()])])
    cells = [next(iter(column.cells)) for column in shown.columns]
    # 2 rows in the median step of 0.03 s
    assert cells[:4] == ["snapkv 0.25", "64", "2", "150.0"] and cells[5] == "30.00" and cells[7] == "67"
    assert cells[9] == "25.0%"


def test_the_full_caches_curve_is_drawn_once_and_from_the_same_rounds(tmp_path, monkeypatch):
    own = row(prompts=(9.0, 9.0), steps=(9.0, 9.0), full=None)
    cells = [("full", [own]), ("snapkv 0.25", [row(length=64), row(length=32)]), ("nacl 0.5", [row(length=64)])]
    found = curves(cells, 2)
    assert [point.length for point in found["full"]] == [32, 64] and found["full"][1].steps == [0.01, 0.01]
    assert [point.length for point in found["snapkv 0.25"]] == [32, 64]
    shown, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (shown.extend(self.axes), save(self, *a, **k)))
    draw_latency(cells, tmp_path / "latency.png")
    for axis in shown:  # every point is inside its panel
        highest = max(max(line.get_ydata()) for line in axis.get_lines())
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] >= highest
    assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_a_curve_has_one_colour_in_all_panels_whichever_curves_these_have(tmp_path, monkeypatch):
    cells = [("kivi 0.25", [row(batch=1)]), ("snapkv 0.25", [row(batch=1), row(batch=2)]), ("full", [row(batch=2)])]
    shown, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (shown.extend(self.axes), save(self, *a, **k)))
    draw_latency(cells, tmp_path / "latency.png")
    colours = [
        {line.get_label(): line.get_color() for line in axis.get_lines() if len(line.get_xdata())} for axis in shown
    ]
    held = [own for own in colours if "snapkv 0.25" in own]
    assert len(held) == 2 and len({own["snapkv 0.25"] for own in held}) == 1
    assert {own["full"] for own in held} == {"black"} and held[0]["kivi 0.25"] != held[0]["snapkv 0.25"]


def test_a_record_of_another_task_is_refused(tmp_path):
    named = {key: {"name": name} for key, name in (("method", "full"), ("model", "m"), ("task", "latency"))}
    identity = {**named, "budget": 1, "protocol": "aware", "dtype": "float32"}
    (tmp_path / "cell.json").write_text(json.dumps({"identity": identity}))
    (tmp_path / "samples.jsonl").write_text(json.dumps({"id": "a", "score": 1.0}) + "\n")
    with pytest.raises(UserError, match="task=latency"):
        read(tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps(row()) + "\n")
    assert read(tmp_path)[0] == "full" and read(tmp_path)[2] == "m, float32, 1 thread"


@pytest.mark.cuda
def test_the_devices_own_peak_is_recorded(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float16).to("cuda").eval()
    (full,) = measure(model, [load_method("full")], Timed(256, 2, 16, 2))
    assert full.device_prompt > full.ledger.held_prompt and full.device_decode > 0
