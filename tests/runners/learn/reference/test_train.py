"""Training: the initial circuit, the rows, a run that is cut short and continued, and what it exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from methods.core.errors import UserError
from runners.learn.reference.blockwise import attend_blockwise
from runners.learn.reference.induction import write_circuit
from runners.learn.reference.packing import DataMix, Packer
from runners.learn.reference.recall import ABILITIES, fitted_document, recall
from runners.learn.reference.train import Train
from runners.learn.reference.vocabulary import train_tokenizer
from tests.bounds import bound, near

REFERENCE = Path(__file__).resolve().parents[4] / "assets" / "reference"
SMALL = {"layers": 2, "mlp": 64, "window": 256, "vocabulary": 600, "tokenizer_documents": 40, "precision": "float32"}
STAGES = [{"until": 1024, "lengths": [128, 256], "batch": 256}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(600, seed=1, documents=40, window=256)


def small(out: Path, **knobs) -> Train:
    knobs = {
        "tokens": 1024,
        "cooldown": 256,
        "stages": STAGES,
        "recall_every": 10**6,
        "recall_documents": 1,
        "warmup": 2,
        **SMALL,
        **knobs,
    }
    return Train(out=str(out), **knobs)


def test_the_untrained_circuit_recalls_pairs():
    train = Train(stages=STAGES)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = LlamaForCausalLM(train.model_config(tokenizer))
    write_circuit(model, seed=3)
    random = torch.Generator().manual_seed(0)
    right = 0
    for _ in range(32):
        table = torch.randint(3, 2048, (16, 3), generator=random)  # two tokens of key, one of value
        asked = table[torch.randint(16, (1,), generator=random)][0]
        ids = torch.cat([table.flatten(), asked[:2]])[None]
        with torch.no_grad():
            right += int(model(ids).logits[0, -1].argmax() == asked[2])
    assert right >= 16  # by chance: at most two


def test_a_row_has_the_asked_length_and_depends_on_its_address_only(tokenizer):
    packer = Packer(tokenizer, seed=1)
    for length in (64, 100, 256, 700):
        first, again, other = packer.row(3, 0, length), packer.row(3, 0, length), packer.row(3, 1, length)
        assert len(first.ids) == len(first.weights) == length
        assert (first.ids == again.ids).all() and (first.weights == again.weights).all()
        assert (first.ids != other.ids).any()


def test_every_answer_of_a_row_ends_with_eos_and_counts_fully(tokenizer):
    row = Packer(tokenizer, seed=1).row(1, 0, 700, DataMix({"facts": 1.0}))
    ends = np.flatnonzero(row.ids == tokenizer.eos_token_id)
    assert len(ends) and (row.weights[ends] == 1.0).all() and (row.weights[ends - 1] == 1.0).all()
    assert (row.weights[row.ids == tokenizer.bos_token_id] < 1.0).all()


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_prompt_in_pieces_has_the_tokens_of_the_whole(tokenizer, ability):
    document = fitted_document(tokenizer, ability, 600, 1, [1, 2, 3])
    turn = document.turns[0]
    pieces = tokenizer(document.opening).input_ids
    for text in (f"\n\n{turn.question}", turn.answer):
        pieces = pieces + tokenizer(text, add_special_tokens=False).input_ids
    assert pieces == tokenizer(document.prompt() + turn.answer).input_ids


@pytest.mark.parametrize("tokens", [1, 128, 200, 700])
def test_blockwise_attention_equals_pytorchs(tokens):
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, heads, tokens, 16, generator=random) for heads in (4, 2, 2))
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    # of sixteen products of normal numbers a logit is the sum, times a quarter: none reaches 8
    near(
        attend_blockwise(q, k, v, 0.25),
        stock,
        2 * bound(torch.float32, tokens, 8.0, size=v.abs().max().item(), width=16),
    )


def test_a_run_cut_after_two_steps_ends_with_the_same_bytes(tmp_path):
    assert small(tmp_path / "whole").run() == 0
    cut = small(tmp_path / "cut", limit=2)
    assert cut.run() == 0 and not (tmp_path / "cut" / "model").exists()
    # what a killed run leaves behind: lines after its last checkpoint, and half a checkpoint
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "tokens": 1, "loss": 0.0}) + '\n{"step": 4, "tok')
    (tmp_path / "cut" / "checkpoint.new").write_bytes(b"half")
    assert small(tmp_path / "cut").run() == 0
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "cut" / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    entries = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, 5))
    assert "recall" in entries[-1] and (tmp_path / "cut" / "curves.png").stat().st_size > 1000


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    small(tmp_path, limit=1).run()
    with pytest.raises(UserError, match="another rates"):
        small(tmp_path, rates=[[0, 1e-4]]).run()


@pytest.mark.parametrize("name", ["train", "train_gpu"])
def test_the_configured_models_take_16_mb_at_most(name):
    with initialize_config_dir(str(REFERENCE.parents[1] / "conf"), version_base=None):
        train = instantiate(compose("config", overrides=[f"runner={name}"]).runner)
    config = train.model_config(PreTrainedTokenizerFast.from_pretrained(REFERENCE))
    with torch.device("meta"):
        assert 2 * LlamaForCausalLM(config).num_parameters() <= 16e6
    assert train.learning_rate(train.warmup, 0) == train.rates[0][1] and train.learning_rate(10**6, train.tokens) == 0
    if name == "train":
        shipped = LlamaConfig.from_pretrained(REFERENCE)
        same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        assert [getattr(config, key) for key in same] == [getattr(shipped, key) for key in same]


def test_training_lococo_is_training_its_compressors(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("runners.learn.compressor.TrainCompressor.run", lambda self, cfg: asked.append(cfg) or 0)
    with initialize_config_dir(str(REFERENCE.parents[1] / "conf"), version_base=None):
        cfg = compose("config", overrides=["runner=train", "method=lococo", f"runner.out={tmp_path}", "budget=16"])
    assert instantiate(cfg.runner).run(cfg) == 0
    assert asked == [cfg] and not list(tmp_path.iterdir())


def test_what_has_not_begun_may_still_change(tmp_path):
    small(tmp_path, limit=1).run()
    later = {"until": 2048, "lengths": [256], "batch": 256}
    changed = small(
        tmp_path, rates=[[0, 1.5e-3], [10_000_000, 1e-4], [20_000_000, 0.0]], stages=[*STAGES, later], limit=1
    )
    with pytest.raises(UserError, match="another rates"):  # the second point bends the line in use
        changed.run()
    assert small(tmp_path, stages=[*STAGES, later], limit=1).run() == 0


def test_the_learning_rate_warms_up_and_cools_down_to_zero():
    train = Train(stages=STAGES, tokens=1000, cooldown=200, rates=[[0, 1.0], [500, 0.5]], warmup=4)
    assert train.learning_rate(0, 0) == 0.25
    assert train.learning_rate(9, 250) == 0.75
    assert train.learning_rate(9, 700) == 0.5
    assert train.learning_rate(9, 900) == 0.25
    assert train.learning_rate(9, 1000) == 0.0


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"stages": []}, "runner.stages"),
        ({"precision": "int3"}, "runner.precision=int3"),
        ({"tokens": 10}, "runner.cooldown"),
        ({"rates": []}, "runner.rates"),
        ({"rates": [[100, 1e-3], [100, 1e-4]]}, "in the order of tokens"),
        ({"stages": [{"until": 9, "lengths": [8192], "batch": 8192}]}, "window"),
        ({"stages": [{"until": 9, "lengths": [256], "batch": 300}]}, "multiple"),
    ],
)
def test_a_wrong_knob_is_named(knobs, said):
    with pytest.raises(UserError, match=said):
        Train(**{"stages": STAGES, **knobs})


def test_the_shipped_checkpoint_is_small_and_finds_needles():
    assert sum(path.stat().st_size for path in REFERENCE.iterdir()) < 16 * 2**20
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    right, asked = recall(model, tokenizer, 512, documents=12, turns=1, seed=99, abilities=("needle",))["needle"]
    assert asked == 12 and right >= 10


def test_the_shipped_model_answers_and_ends_by_itself():
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    right = 0
    for i in range(5):
        document = fitted_document(tokenizer, "pairs", 400, 1, [5, 5, i])
        inputs = tokenizer(document.prompt(), return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=24)[0]
        assert ids[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right += answer == document.turns[0].answer
    assert right >= 4


@pytest.mark.parametrize(("name", "layers", "kv_heads"), [("train_deep", 12, 4), ("train_decode", 4, 2)])
def test_the_other_models_are_settings_of_the_same_training_and_small(name, layers, kv_heads):
    with initialize_config_dir(str(REFERENCE.parents[1] / "conf"), version_base="1.3"):
        made = instantiate(compose("config", [f"runner={name}"]).runner)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    config = made.model_config(tokenizer)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (layers, kv_heads)
    assert 2 * sum(p.numel() for p in LlamaForCausalLM(config).parameters()) < 16e6  # bytes in float16
