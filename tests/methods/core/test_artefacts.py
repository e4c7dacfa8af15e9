"""Artefacts: found by the model's name, checked against it, and missing ones with the command that makes them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from methods.core import artefacts
from methods.core.errors import UserError

SHAPE = (2, 2, 16)


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "PLACES", [tmp_path / "assets"])
    return tmp_path / "assets"


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, **changes})).eval()


def saved(model, **facts):
    return artefacts.save("filt", "filters", model, {"w": torch.arange(64.0).view(SHAPE)}, {"rows": 3, **facts})


def load(model, **knobs):
    return artefacts.load("filt", "filters", model, **knobs)


def test_what_was_saved_is_loaded_with_its_facts():
    made = model()
    path = saved(made, seed=7)
    found = load(made, shapes={"w": SHAPE})
    assert found.path == path and found.card["rows"] == 3 and found.card["seed"] == 7
    assert torch.equal(found.tensors["w"], torch.arange(64.0).view(SHAPE))


def test_a_saved_model_is_named_by_its_folder_and_knows_its_artefact_in_every_dtype(tmp_path, assets):
    model().save_pretrained(tmp_path / "little")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "little")
    assert saved(made) == assets / "filt" / "little" / "filters.safetensors"
    for dtype in (torch.float16, torch.bfloat16):
        load(AutoModelForCausalLM.from_pretrained(tmp_path / "little", dtype=dtype))


def test_hub_models_are_named_by_repository_and_commit(tmp_path):
    here = model()
    here.config.name_or_path = str(tmp_path / "hub" / "models--owner--name" / "snapshots" / "0123abcd")
    assert artefacts.model_id(here) == "owner--name" and artefacts.identity(here)["revision"] == "0123abcd"
    saved(here)
    here.config.name_or_path = str(tmp_path / "hub" / "models--owner--name" / "snapshots" / "feed0000")
    with pytest.raises(UserError, match=r"revision is 0123abcd there, feed0000 here.*model\.path=owner/name"):
        load(here)
    here.config.name_or_path = "owner/name"
    load(here)  # the same weights, and no commit to tell them apart by


def test_a_missing_artefact_names_the_command_that_makes_it(tmp_path):
    model().save_pretrained(tmp_path / "little")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "little")
    command = f"python run.py runner=train method=filt model.path={tmp_path / 'little'}"
    with pytest.raises(UserError) as said:
        load(here, make="runner=train")
    assert str(said.value).endswith(command) and "no filters for the model little" in str(said.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "the weights are others"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            r"rope_theta is 10000.0 there, 500.0 here",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
            "factor is None there, 2.0",
        ),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 2 there, 4 here"),
    ],
)
def test_an_artefact_of_another_model_says_what_differs(changes, said, tmp_path):
    path = saved(model())
    with pytest.raises(UserError, match=said):
        load(model(**changes), path=path)


def test_weights_a_fiftieth_apart_are_another_checkpoint(tmp_path):
    path, other = saved(model()), model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    with pytest.raises(UserError, match="the weights are others"):
        load(other, path=path)


def test_an_artefact_in_the_folder_of_another_model_is_refused_by_name(assets):
    first, second = model(), model()
    first.config.name_or_path, second.config.name_or_path = "a/first", "a/second"
    saved(first)
    (assets / "filt" / "a--first").rename(assets / "filt" / "a--second")
    with pytest.raises(UserError, match="id is a--first there, a--second here"):
        load(second)
    load(second, path=assets / "filt" / "a--second" / "filters.safetensors")  # given by path, the weights decide


def test_a_tensor_of_the_wrong_shape_or_none_at_all_is_refused():
    here = model()
    saved(here)
    with pytest.raises(UserError, match=r"w has the shape \[2, 2, 16\], the model needs \[2, 4, 16\]"):
        load(here, shapes={"w": (2, 4, 16)})
    with pytest.raises(UserError, match="it holds no tensor x"):
        load(here, shapes={"x": SHAPE})


def test_broken_files_and_cards_of_other_files_are_refused():
    here = model()
    path = saved(here)
    card = path.with_suffix(".json")
    good = card.read_text()
    card.write_text("{")
    with pytest.raises(UserError, match="is broken"):
        load(here)
    card.write_text(json.dumps({**json.loads(good), "sha256": "0"}))
    with pytest.raises(UserError, match="belongs to another file"):
        load(here)
    card.unlink()
    with pytest.raises(UserError, match=r"its card .* is missing"):
        load(here)
    card.write_text(good)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is broken"):
        load(here)


def test_a_model_that_was_never_saved_is_named_by_its_weights():
    assert artefacts.model_id(model()) == artefacts.model_id(model()) != artefacts.model_id(model(seed=1))


def test_a_record_can_tell_one_state_of_the_artefacts_from_another(tmp_path, assets):
    model().save_pretrained(tmp_path / "little")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "little")
    at = str(tmp_path / "little")
    assert artefacts.state(["filt"], at, ["auto", 3, None]) is None
    path = saved(here)
    first = artefacts.state(["filt"], at)
    assert first is not None and first == artefacts.state(["other", "filt"], at, ["auto"])
    saved(here, seed=8)
    assert artefacts.state(["filt"], at) not in (None, first)
    assert artefacts.state(["other"], at) is None
    # a file that a knob names counts wherever it lies
    assert artefacts.state(["other"], at, [str(path)]) is not None
    # and what a file is called says what it is for
    before = artefacts.state(["filt"], at)
    path.rename(path.with_stem("others"))
    assert artefacts.state(["filt"], at) not in (None, before)
