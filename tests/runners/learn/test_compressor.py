"""Training of LoCoCo's compressors: what it makes, that it goes on where it stopped, and that only they learn."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from methods import load_method
from methods.core import artefacts
from methods.core.errors import UserError
from runners.engine.loading import find, load_model, load_tokenizer
from runners.learn import compressor
from runners.learn.compression.held_out import compare_with_dropping, losses, predicted
from runners.learn.compression.text_rows import rows_of, split_text
from runners.learn.compressor import TrainCompressor
from tests.bounds import half_digit, losses_off, near

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "read", "about", "long", "rivers", "in", "northern", "woods"]
NAME = "m16-c16-k5-r0.5"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file of random words."""
    g = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (6000,), generator=g).tolist()))
    return path


@pytest.fixture
def made(tiny_model_dir, text, tmp_path):
    """Trains in a folder of its own: made("one", batches=2) -> (model, folder of the artefact).

    sharper: factor of the model's logits.
    """

    def train(folder: str, sharper: float = 1.0, **changes):
        checkpoint = find(str(tiny_model_dir))
        model = load_model(checkpoint, torch.float32, torch.device("cpu")).requires_grad_(False)
        model.get_output_embeddings().weight.data *= sharper
        at = tmp_path / folder
        settings = dict(length=96, batch=2, batches=4, lr=1e-2, init_std=0.1, chosen_on=2, held_out=2, measure_every=2)
        runner = TrainCompressor(out=str(at), export=str(at), text=str(text), **{**settings, **changes})
        assert runner.train(model, load_tokenizer(checkpoint), small(), seed=0) == 0
        return model, at

    train.at = tmp_path
    return train


def small(**knobs):
    return load_method("lococo", budget=16, buffer=0, kernel_size=5, **knobs)


def test_what_is_trained_is_loaded_by_the_method_and_its_card_says_what_it_is(made, tiny_model_dir):
    model, at = made("one")
    card = json.loads((at / f"{NAME}.json").read_text())
    assert (card["slots"], card["chunk"], card["kernel_size"], card["hh_keep_rate"]) == (16, 16, 5, 0.5)
    assert card["model"]["id"] == tiny_model_dir.name and len(card["training"]["data"]) == 16
    assert card["steps"] == 16  # 4 batches, 6 chunks each, compressed before the third and those after it
    (found,) = card["held_out"].values()
    assert set(found["nll"]) == {"full", "lococo", "eta=0", "h2o"} and set(found["gain"]) == {"eta=0", "h2o"}
    method = small(artefact=str(at / f"{NAME}.safetensors"))
    rows = rows_of(load_tokenizer(find(str(tiny_model_dir))), "the cat sat on a mat " * 40, 96)
    assert torch.equal(losses(model, method, rows, 2), losses(model, method, rows, 1))
    assert not torch.equal(losses(model, method, rows, 2), losses(model, small(eta=0), rows, 2))
    assert (at / f"{NAME}.png").stat().st_size > 5000


def test_only_the_compressors_learn(made, tiny_model_dir):
    model, at = made("one")
    fresh = load_model(find(str(tiny_model_dir)), torch.float32, torch.device("cpu"))
    for (name, one), (_, other) in zip(model.named_parameters(), fresh.named_parameters()):
        assert torch.equal(one, other), name
    torch.manual_seed(0)
    before = {key: tensor for key, tensor in small().new_compressors(model).state_dict().items()}
    after = load_file(at / f"{NAME}.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        start = tensor * 0.1 if key.endswith("weight") else tensor
        assert (after[key].float() - start).abs().max() > 1e-4, key


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(made):
    _, at = made("one")
    for _ in range(4):
        _, parts = made("parts", limit=1)
    whole, pieces = (load_file(folder / f"{NAME}.safetensors") for folder in (at, parts))
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)
    logs = [next(folder.rglob("log.jsonl")).read_text().splitlines() for folder in (at, parts)]
    one, other = ([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs)
    assert one == other


@pytest.mark.parametrize("loss", ["full", "text"])
def test_the_first_loss_is_that_of_the_chunks_behind_a_compression(loss, made, tiny_model_dir, text):
    # a closed gate that stays closed: what is held is what dropping would leave
    # sharp predictions: a divergence and its reverse are far apart
    _, at = made("one", 30.0, loss=loss, batches=1, measure_every=1, init_gate=0.0, lr=0.0, gate_lr=0.0)
    logged = json.loads(next(at.rglob("log.jsonl")).read_text().splitlines()[0])["loss"]
    checkpoint = find(str(tiny_model_dir))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    model.get_output_embeddings().weight.data *= 30.0
    settings = dict(length=96, batch=2, text=str(text), loss=loss)
    trained, _ = TrainCompressor(**settings).rows(load_tokenizer(checkpoint), 0)
    ids = trained(0)
    with torch.no_grad():
        dropping = model(ids, past_key_values=small(eta=0).cache_for(model)).logits.log_softmax(-1)
        whole = predicted(model, ids)
    if loss == "full":
        each = (whole.exp() * (whole - dropping)).sum(-1)[:, 32:].mean()
    else:
        inside = [p for p in range(32, 95) if (p + 1) % 16]  # a chunk's last token predicts into the next one
        each = -dropping[:, :-1].gather(2, ids[:, 1:, None])[:, inside].mean()
    near(logged, each, losses_off())


def test_the_weights_that_did_best_on_what_chooses_are_saved_and_not_the_last(made, monkeypatch):
    measured, scripted = compressor.losses, iter([1.0, 2.0])

    def said(*given):
        value = next(scripted, None)
        return measured(*given) if value is None else torch.full((1, 1), value)

    monkeypatch.setattr(compressor, "losses", said)
    made("one", limit=2)  # the checkpoint then holds the weights that are measured first
    (place,) = (made.at / "one").rglob("checkpoint.pt")
    best = torch.load(place, weights_only=True)["nets"]
    _, at = made("one")
    last = torch.load(place, weights_only=True)["nets"]
    saved = load_file(at / f"{NAME}.safetensors")
    assert json.loads((at / f"{NAME}.json").read_text())["chosen_after"] == 2
    assert all(torch.equal(saved[key], best[key].half()) for key in saved)
    assert any(not torch.equal(saved[key], last[key].half()) for key in saved)


@pytest.mark.slow
def test_generated_rows_are_new_in_every_batch_and_the_same_for_a_seed(tiny_tokenizer):
    settings = TrainCompressor(length=200, batch=2, chosen_on=1, held_out=1)
    trained, held_out = settings.rows(tiny_tokenizer, 0)
    assert trained(0).shape == (2, 200) and not torch.equal(trained(0)[0], trained(0)[1])
    assert not torch.equal(trained(0), trained(1)) and torch.equal(trained(1), settings.rows(tiny_tokenizer, 0)[0](1))
    assert not torch.equal(trained(0), settings.rows(tiny_tokenizer, 1)[0](0))
    assert list(held_out) == ["documents and prose", "prose"] and len(held_out["documents and prose"]) == 2


def test_newest_slots_kept_in_training_are_in_the_card_and_in_the_comparison(tiny_model_dir, text, tmp_path):
    checkpoint = find(str(tiny_model_dir))
    model = load_model(checkpoint, torch.float32, torch.device("cpu")).requires_grad_(False)
    settings = dict(length=96, batch=2, batches=1, init_std=0.1, chosen_on=2, held_out=2, measure_every=1)
    runner = TrainCompressor(out=str(tmp_path), export=str(tmp_path), text=str(text), **settings)
    assert runner.train(model, load_tokenizer(checkpoint), small(local_len=4), seed=0) == 0
    card = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert card["local_len"] == 4
    assert set(card["held_out"]["words.txt"]["gain"]) == {"eta=0", "eta=0, recent", "h2o"}


def test_other_settings_begin_anew(made):
    _, at = made("one", batches=2)
    _, at = made("one", batches=2, lr=2e-2)
    log = next(at.rglob("log.jsonl")).read_text().splitlines()
    assert [json.loads(line)["batch"] for line in log if "loss" in json.loads(line)] == [1, 2]


def test_chunks_before_the_first_compression_teach_nothing(made, tiny_model_dir, text):
    runner = TrainCompressor(length=32, text=str(text))
    checkpoint = find(str(tiny_model_dir))
    model = load_model(checkpoint, torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match="with 0 compressions each"):  # two chunks of 16, nothing to compress
        runner.train(model, load_tokenizer(checkpoint), small(), seed=0)


def test_rows_cover_the_text_once_and_begin_with_bos(tiny_tokenizer):
    rows = rows_of(tiny_tokenizer, "a b c d e f g h i j", 5)
    assert rows[:, 0].tolist() == [tiny_tokenizer.bos_token_id] * len(rows)
    ids = tiny_tokenizer("a b c d e f g h i j", add_special_tokens=False).input_ids
    assert rows[:, 1:].flatten().tolist() == ids[: len(rows) * 4]


def test_the_held_out_end_of_a_text_is_not_trained_on(text):
    trained, held_out = split_text(str(text))
    assert trained + held_out == text.read_text()
    assert abs(len(held_out) - len(text.read_text()) / 20) <= 1


def test_baselines_hold_the_same_slots_and_differences_are_of_the_same_rows(made, tiny_model_dir, text):
    model, at = made("one")
    method = small(artefact=str(at / f"{NAME}.safetensors"))
    rows = rows_of(load_tokenizer(find(str(tiny_model_dir))), split_text(str(text))[1], 96)[:4]
    found = compare_with_dropping(model, method, rows, batch=4)
    means = found["nll"]
    for name in ("eta=0", "h2o"):
        gain, low, high = found["gain"][name]
        near(gain, means[name] - means["lococo"], 4 * half_digit(5))  # rounded to so many digits
        assert low <= gain <= high
    near(means["full"], losses(model, load_method("full"), rows, 4).mean(), losses_off() + half_digit(5))


@pytest.fixture
def command(tmp_path, tiny_model_dir, text, monkeypatch, run_command):
    """The training: command("budget=16", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(artefacts, "PLACES", [tmp_path / "assets"])
    given = (f"model.path={tiny_model_dir}", f"runner.text={text}", f"runner.out={tmp_path / 'out'}")
    return partial(run_command, "runner=train", *given)


SMALL = (
    "method.buffer=0",
    "method.kernel_size=5",
    "runner.length=96",
    "runner.batches=1",
    "runner.chosen_on=2",
    "runner.held_out=2",
    "runner.init_gate=null",
)


def test_the_command_puts_the_artefact_where_the_method_looks(command, tmp_path, tiny_model_dir):
    code, out, err = command("method=lococo", "budget=16", *SMALL)
    assert code == 0, err
    assert "held-out perplexity" in out and "nats above lococo" in out
    assert (tmp_path / "assets" / "lococo" / tiny_model_dir.name / f"{NAME}.safetensors").is_file()
    model = load_model(find(str(tiny_model_dir)), torch.float32, torch.device("cpu"))
    assert len(small().prepare(model)) == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=snapkv",), "method=snapkv"),
        (("method=lococo", "budget=1"), "budget=1"),
        (("method=lococo", "budget=16", "method.eta=0"), "nothing to train"),
        (("method=lococo", "budget=16", "runner.batch=0"), "runner.batch=0"),
        (("method=lococo", "budget=16", "runner.loss=mse"), "runner.loss=mse; it is one of full, text"),
        (("method=lococo", "budget=16", "runner.text=nowhere.txt"), "runner.text=nowhere.txt"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(command, overrides, said):
    code, _, err = command(*overrides)
    assert code == 2
    assert said in err and err.count("\n") == 1
