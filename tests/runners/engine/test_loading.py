"""Checkpoints: found, checked and loaded, with an answer to everything that can be missing."""

import hashlib
import json
import shutil

import pytest
import torch

from methods.core.errors import UserError
from runners.engine import loading as load
from runners.engine.loading import (
    Checkpoint,
    checkpoint_of,
    date_of,
    find,
    load_model,
    load_tokenizer,
)
from runners.engine.prompt import Encoder


@pytest.fixture
def copy(tmp_path, tiny_model_dir):
    return shutil.copytree(tiny_model_dir, tmp_path / "copy")


def test_a_file_that_is_not_there_or_not_read_is_said_as_it_was_typed(tmp_path):
    with pytest.raises(UserError, match=r"^model\.path=.*absent\.gguf: no such file$"):
        find(str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"no such folder, for model\.file=a\.gguf$"):
        find(str(tmp_path / "absent"), file="a.gguf")
    with pytest.raises(UserError, match=r"^model\.file=a\.gguf: random weights are read from no file"):
        checkpoint_of({"path": str(tmp_path), "init": "random", "file": "a.gguf"})


def test_a_folder_loads_in_the_dtype_asked_for(tiny_model_dir):
    checkpoint = find(str(tiny_model_dir))
    model = load_model(checkpoint, torch.bfloat16, torch.device("cpu"))
    assert model.dtype == torch.bfloat16 and not model.training
    assert load_tokenizer(checkpoint).decode([1]) == "<s>"
    assert checkpoint.commit is None and checkpoint.window == 2048 and checkpoint.ends == {2}


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no weights \(\*\.safetensors\)"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_says_which(copy, missing, says):
    (copy / missing).unlink()
    with pytest.raises(UserError, match=says) as caught:
        find(str(copy))
    assert str(copy) in str(caught.value)


def test_weights_that_are_not_safetensors_are_refused_by_name(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read, because only safetensors are"):
        find(str(copy))


def test_broken_files_are_a_users_error(copy):
    (copy / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(find(str(copy)), torch.float32, torch.device("cpu"))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        load_tokenizer(find(str(copy)))


def test_weights_that_lack_a_tensor_are_refused_instead_of_filled_with_noise(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors of the model, such as model\.layers\.1\.mlp\.up_proj"):
        load_model(find(str(copy)), torch.float32, torch.device("cpu"))


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_from_hub", lambda *a: pytest.fail("asked the hub"))
    for path in (str(tmp_path / "nowhere"), "./nowhere", "assets/referense", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            find(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        find(str(tmp_path / "file"))


def test_an_unreachable_hub_names_the_ways_without_it(monkeypatch):
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*model\.path=DIR"):
        find("someone/some-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load.hub, "unreachable", lambda url: "no route")
    with pytest.raises(UserError, match=r"no route.*model\.path=DIR.*HF_HUB_OFFLINE=1"):
        find("someone/some-model")


def test_a_model_in_the_hubs_cache_loads_without_a_network_and_knows_its_commit(tmp_path, copy, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(copy, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import functools

    import huggingface_hub

    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = find("someone/some-model")
    assert checkpoint.commit == checkpoint.weights == commit
    assert load_model(checkpoint, torch.float32, torch.device("cpu")).config.num_hidden_layers == 2


def test_the_weights_hash_follows_the_weights_and_not_the_folder(copy, tiny_model_dir):
    same, other = find(str(tiny_model_dir)).weights, find(str(copy)).weights
    assert same == other and same.startswith("sha256:")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert find(str(copy)).weights != same


def test_the_prompts_length_follows_the_window_where_none_is_given(copy):
    config = json.loads((copy / "config.json").read_text())
    for window, expected in ((4096, 3596), (600, 300), (None, None)):
        (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": window}))
        checkpoint = Checkpoint("copy", copy)
        assert checkpoint.max_length(None) == expected and checkpoint.max_length(7) == 7


def test_random_weights_need_only_a_configuration_and_are_the_same_every_time(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "config.json")
    settings = {"path": "someone/some-model", "init": "random", "shape": str(tmp_path), "resize": None}
    checkpoint = checkpoint_of(settings)
    assert checkpoint.name == "some-model-random" and checkpoint.weights.startswith("random:")
    one, two = (load_model(checkpoint, torch.bfloat16, torch.device("cpu")) for _ in range(2))
    assert one.dtype == torch.bfloat16 and not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(checkpoint)


def test_a_shape_can_be_resized_and_is_another_model_then(tmp_path, tiny_model_dir):
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "config.json")
    settings = {"path": "some-model", "init": "random", "shape": str(tmp_path)}
    resized = checkpoint_of({**settings, "resize": {"num_hidden_layers": 1, "max_position_embeddings": 99}})
    assert load_model(resized, torch.float32, torch.device("cpu")).config.num_hidden_layers == 1
    assert resized.window == 99
    assert resized.weights != checkpoint_of(settings).weights and resized.name != checkpoint_of(settings).name
    with pytest.raises(UserError, match=r"LlamaConfig has no depth"):
        load_model(checkpoint_of({**settings, "resize": {"depth": 1}}), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"give model.init=random"):
        checkpoint_of({"path": str(tiny_model_dir), "resize": {"num_hidden_layers": 1}})
    with pytest.raises(UserError, match=r"model.init=zeros"):
        checkpoint_of({"path": str(tiny_model_dir), "init": "zeros"})
    with pytest.raises(UserError, match=r"model.shape=DIR"):
        checkpoint_of({"path": "someone/some-model", "init": "random"})


def test_the_shape_of_llama_8b_ships_with_the_project():
    checkpoint = checkpoint_of(
        {"path": "meta-llama/Llama-3.1-8B", "init": "random", "shape": "assets/shapes/llama3.1-8b"}
    )
    assert checkpoint.window == 131072
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint.folder))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt",
        "added_tokens.json", "special_tokens_map.json", "vocab.json", "tokenizer.model", "config.json",
        "additional_chat_templates/rag.jinja",
    ],
)  # fmt: skip
def test_every_file_that_decides_prompts_or_stops_is_part_of_what_a_model_is(copy, name):
    before = find(str(copy)).files
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b'{"eos_token_id": [1, 2]}')
    after = find(str(copy)).files
    assert {key for key in before | after if before.get(key) != after.get(key)} == {name}


def test_what_only_tells_of_a_model_is_no_part_of_it(copy):
    before = find(str(copy)).files
    for name in ("README.md", "trainer_state.json", "measured.json", "picture.png"):
        (copy / name).write_text("{}")
    assert find(str(copy)).files == before


def test_the_weights_of_a_record_written_before_are_known_again(tmp_path):
    """The hash as commit 4be9054 made it: names and contents, in the order of their names."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"w")
    (tmp_path / "tokenizer.json").write_text("[]")
    total = hashlib.sha256()
    for name, content in (("config.json", b"{}"), ("model.safetensors", b"w"), ("tokenizer.json", b"[]")):
        total.update(name.encode() + hashlib.sha256(content).digest())
    assert Checkpoint("x", tmp_path).weights == f"sha256:{total.hexdigest()[:16]}"


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/model.safetensors", "a/../../b", "C:\\w", "..\\w"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(copy, name):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names .* outside the folder"):
        find(str(copy))


def test_weights_in_a_folder_below_count_where_an_index_names_them(copy):
    (copy / "part").mkdir()
    (copy / "part" / "a.safetensors").write_bytes(b"1")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part/a.safetensors"}}))
    before = find(str(copy)).weights
    (copy / "part" / "a.safetensors").write_bytes(b"2")
    assert find(str(copy)).weights != before
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read: no `weight_map`"):
        find(str(copy))


def test_a_template_that_writes_todays_date_is_told_a_fixed_one(copy):
    settings = {"chat": True}
    assert date_of(find(str(copy)), settings) is None
    template = "{% if strftime_now is defined %}{% set form = '%d %b %Y' %}\n {{ strftime_now(form) }}{% endif %}"
    (copy / "chat_template.jinja").write_text(template + ": {{ messages[-1].content }}")
    assert date_of(find(str(copy)), settings) == "2024-07-26"
    day = date_of(find(str(copy)), settings | {"date": "2031-12-30"})
    assert Encoder(load_tokenizer(find(str(copy))), ends=[], date=day).templated([], "a") == " 30 Dec 2031: a"
    for wrong in ("today", "2024-13-01", 7):
        with pytest.raises(UserError, match=f"model.date={wrong}: give a day such as 2024-07-26"):
            date_of(find(str(copy)), settings | {"date": wrong})


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "null", "[]", "7", DEEP, '{"a": 1', '{"text_config": 7}', "\ufffe{}"])
def test_a_config_that_is_none_is_named_in_one_line(copy, text):
    (copy / "config.json").write_text(text, encoding="utf-16" if text.startswith("\ufffe") else "utf-8")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        find(str(copy)).window  # noqa: B018
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("window", ["long", -1, 1.5, [2048], {"a": 1}, True])
def test_a_window_that_is_no_number_of_tokens_is_named(copy, window):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": window}))
    with pytest.raises(UserError, match=r"config\.json: max_position_embeddings=.*: give a whole number, 1 or more"):
        find(str(copy)).window  # noqa: B018


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", DEEP, '{"eos_token_id": {"a": 1}}', '{"eos_token_id": 1.5}', '{"eos_token_id": "two"}',
     '{"eos_token_id": [1, null]}', '{"eos_token_id": true}', '{"eos_token_id": -1}'],
)  # fmt: skip
def test_generation_defaults_that_are_none_are_named_in_one_line(copy, text):
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json") as caught:
        find(str(copy)).ends  # noqa: B018
    assert len(str(caught.value).splitlines()) == 1


def test_weights_that_are_a_folder_or_a_link_to_nothing_are_named(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to(copy / "gone")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to nothing"):
        find(str(copy))
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors is a folder"):
        find(str(copy))


def test_a_name_without_an_owner_is_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(load, "_from_hub", lambda name, revision: Checkpoint(name, load.ROOT, commit="c"))
    assert find("gpt2").path == "gpt2"
    for folder in ("no/such/folder", "../gpt2", "assets/nothing", "/gpt2", "a b"):
        with pytest.raises(UserError, match="no such folder"):
            find(folder)


@pytest.mark.parametrize(
    ("name", "first", "package"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n", "sentencepiece"),
        ("spiece.model", b"\n\x0e\n\x05<unk>\x15", "sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_a_tokenizer_of_one_file_names_the_package_that_reads_it(
    name, first, package, tiny_model_dir, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    (folder / name).write_bytes(first)
    monkeypatch.setattr(load.folders, "find_spec", lambda wanted: None)
    with pytest.raises(
        UserError, match=rf"its tokenizer is {name} alone.*{package}, is not installed; pip install {package}"
    ):
        load.load_tokenizer(load.find(str(folder)))


def test_a_tokenizer_in_the_library_s_own_form_needs_neither_package(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(load.folders, "find_spec", lambda wanted: None)
    assert load.load_tokenizer(load.find(str(tiny_model_dir)))("the cat").input_ids


def test_a_tokenizer_of_one_sentencepiece_file_is_read(tiny_model_dir, tmp_path):
    import sentencepiece

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "read", "about", "a", "long", "river", "in", "the", "north"]
    texts = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    tokenizer = load.load_tokenizer(load.find(str(folder)))
    assert tokenizer.decode(tokenizer.encode("the cat sat", add_special_tokens=False)) == "the cat sat"
