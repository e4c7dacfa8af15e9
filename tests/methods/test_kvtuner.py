"""Tables of bits: reading them, the paper's own, which one a budget takes, and what a layer packs under it."""

import dataclasses
import json

import pytest
import torch
import yaml

from kernels import quantize as q
from methods import load_method
from methods.core import artefacts
from methods.core.contract import ModelSpec, Stage
from methods.core.errors import UserError
from methods.kvtuner import Pair, nominal_bits, parse_table, read_table, table_yaml
from tests.bounds import bound, half_digit, near, run_off
from tests.kernels.formula import largest_logit
from tests.methods.conftest import kept, run, tiny_llama
from tests.tables import tables_for

PUBLISHED = {
    ("meta-llama--Llama-3.1-8B-Instruct", "kivi", "C3.25"): 3.25,
    ("meta-llama--Llama-3.1-8B-Instruct", "per_token", "C3.59"): 3.59375,
    ("Qwen--Qwen2.5-7B-Instruct", "per_token", "C4.00"): 4.0,
}
BOTH = pytest.mark.parametrize("name", ["kvtuner", "kvtuner_per_token"])
LLAMA_8B = ModelSpec("llama", 32, 32, 8, 128, 131072, torch.float16, torch.device("cpu"), [None] * 32)


def entries(*pairs: tuple[int, int]) -> dict:
    """A table as a user writes it."""
    return {layer: {"nbits_key": key, "nbits_value": value} for layer, (key, value) in enumerate(pairs)}


def tokens(n: int, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, n), generator=torch.Generator().manual_seed(seed))


def bytes_per_token(name: str, table=None, **knobs) -> float:
    """Of Llama-3.1-8B in float16, tokens that stay unpacked left out."""
    method = load_method(name, table=table, **knobs)
    prepared = [] if table is None else [parse_table(table, "test")]
    stores = method.stores(dataclasses.replace(LLAMA_8B, prepared=prepared), None)
    n = 3200
    sizes = [scheme.nbytes(n, 128, 2) for store in stores for scheme in store.choose(n, 128, 128, 2)]
    return 8 * sum(sizes) / n


@pytest.mark.parametrize(("model", "mode", "name"), PUBLISHED)
def test_the_published_tables_have_the_published_average(model, mode, name):
    table = read_table(artefacts.ROOT / "assets" / "kvtuner" / model / mode / f"{name}.yaml")
    assert nominal_bits(table) == PUBLISHED[model, mode, name]
    assert name == f"C{nominal_bits(table):.2f}"


def published(model: str, mode: str, name: str) -> dict:
    return yaml.safe_load((artefacts.ROOT / "assets" / "kvtuner" / model / mode / f"{name}.yaml").read_text())


def test_the_published_tables_take_the_published_bytes():
    llama = "meta-llama--Llama-3.1-8B-Instruct"
    assert bytes_per_token("kvtuner_per_token", bits=8) == 67_584
    assert bytes_per_token("kvtuner_per_token", bits=4) == 34_816
    assert bytes_per_token("kvtuner_per_token", published(llama, "per_token", "C3.59")) == 31_488
    assert bytes_per_token("kvtuner", published(llama, "kivi", "C3.25")) == 34_816
    assert bytes_per_token("kvtuner", bits=2) == 24_576


def test_effective_bits_are_the_published_ones():
    llama = "meta-llama--Llama-3.1-8B-Instruct"
    for name, mode, table, bits in (
        ("kvtuner", "kivi", "C3.25", 4.25),
        ("kvtuner_per_token", "per_token", "C3.59", 3.84),
    ):
        entries = parse_table(published(llama, mode, table), "test")
        near(load_method(name, bits=4).effective_bits(entries, 128), bits, half_digit(2))


def test_a_published_table_is_found_by_the_models_id_and_its_number_of_layers():
    class Config:
        name_or_path = "meta-llama/Llama-3.1-8B-Instruct"
        num_hidden_layers = 32

        def get_text_config(self, decoder):
            return self

    class Model:
        config = Config()

    (table,) = load_method("kvtuner", budget=0.3).prepare(Model())
    assert str(table[13]) == "K8V4" and str(table[0]) == "KV2"
    (table,) = load_method("kvtuner_per_token", table="C3.59").prepare(Model())
    assert str(table[0]) == "K4V8"
    with pytest.raises(UserError, match=r"method\.table=C4\.00.*there are C3\.59"):
        load_method("kvtuner_per_token", table="C4.00").prepare(Model())
    Config.num_hidden_layers = 31
    with pytest.raises(UserError, match=r"C3\.25\.yaml: has 32 layers, the model has 31"):
        load_method("kvtuner", budget=0.3).prepare(Model())


def test_a_table_is_written_as_it_is_read(tmp_path):
    table = (Pair(8, 4), Pair(2, 2), Pair(4, 2))
    (tmp_path / "t.yaml").write_text(table_yaml(table))
    assert read_table(tmp_path / "t.yaml") == table
    assert yaml.safe_load(table_yaml(table)) == entries(*table)


def test_heads_that_agree_are_a_layer_and_heads_that_do_not_are_refused():
    four = {"nbits_key": 4, "nbits_value": 2}
    assert parse_table({0: {0: four, 1: four}}, "t") == (Pair(4, 2),)
    with pytest.raises(UserError, match="layer 0: heads have different bits"):
        parse_table({0: {0: four, 1: {"nbits_key": 8, "nbits_value": 2}}}, "t")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "give layers"),
        ({1: {"nbits_key": 4, "nbits_value": 4}}, "names the layers 1"),
        ({0: {"nbits_key": 4}}, "layer 0: is .*give nbits_key and nbits_value"),
        ({0: {"nbits_key": 5, "nbits_value": 4}}, "bits are 2, 4, 8, 16"),
    ],
)
def test_tables_that_cannot_work_are_named(table, said):
    with pytest.raises(UserError, match=said):
        parse_table(table, "t")


def test_settings_that_cannot_work_are_named(tmp_path):
    with pytest.raises(UserError, match=r"method\.mode=hqq"):
        load_method("kvtuner", mode="hqq")
    for name, mode, other in (("kvtuner", "per_token", "KIVI"), ("kvtuner_per_token", "kivi", "PerToken")):
        with pytest.raises(UserError, match=rf"method\.mode={mode}.*{other}.*give method=kvtuner"):
            load_method(name, mode=mode)
    with pytest.raises(UserError, match="give one of them"):
        load_method("kvtuner", table="C3.25", bits=4)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_method("kvtuner", table=str(tmp_path / "none.yaml")).cache_for(tiny_llama())
    with pytest.raises(UserError, match="has 3 layers, the model has 2"):
        load_method("kvtuner", table=entries((4, 4), (4, 4), (4, 4))).cache_for(tiny_llama())


@BOTH
def test_sixteen_bits_everywhere_are_the_full_cache_bit_for_bit(name, any_heads):
    ids, new = tokens(90), tokens(8, seed=2)
    expected = run(any_heads, load_method("full").cache_for(any_heads), ids, new=new)
    method = load_method(name, table=entries((16, 16), (16, 16)))
    assert torch.equal(run(any_heads, method.cache_for(any_heads), ids, new=new), expected)


@BOTH
def test_a_table_of_one_pair_is_the_uniform_method(name, gqa):
    ids, new = tokens(90), tokens(40, seed=2)
    same = [load_method(name, table=entries((4, 2), (4, 2))), load_method(name, key_bits=4, value_bits=2)]
    first, second = (run(gqa, method.cache_for(gqa), ids, new=new) for method in same)
    assert torch.equal(first, second)


@pytest.mark.parametrize("pairs", [((8, 2), (2, 4)), ((2, 4), (16, 8))])
def test_every_layer_packs_its_keys_and_values_with_its_own_bits(pairs, any_heads):
    cache = load_method("kvtuner_per_token", table=entries(*pairs)).cache_for(any_heads)
    run(any_heads, cache, tokens(90))
    H, D = any_heads.config.num_key_value_heads, 16
    for held, pair in zip(cache.report().per_layer, pairs):
        # codes and, per token and head, a scale and an offset; positions of the slots, once per layer
        sizes = [D * 4 if bits == 16 else D * bits // 8 + 4 for bits in pair]
        assert held == 90 * (H * sum(sizes) + 4)


def test_nothing_is_dropped_and_the_newest_of_an_unfinished_block_stay_as_they_are(gqa):
    cache = load_method("kvtuner", table=entries((2, 2), (8, 8))).cache_for(gqa)
    run(gqa, cache, tokens(90), new=tokens(5, seed=2))
    assert kept(cache, 0) == kept(cache, 1) == list(range(95))
    full = load_method("full").cache_for(gqa)
    run(gqa, full, tokens(90), new=tokens(5, seed=2))
    k, v = cache.layers[0].inner.store.read()
    k_full, v_full = full.layers[0].inner.store.read()
    # two blocks of 32 are packed, keys and values alike; in the first layer the rest is what it was
    assert torch.equal(k[:, :, 64:90], k_full[:, :, 64:90]) and torch.equal(v[:, :, 64:90], v_full[:, :, 64:90])
    assert all((k[:, :, i] != k_full[:, :, i]).any() and (v[:, :, i] != v_full[:, :, i]).any() for i in range(64))


def test_a_block_is_packed_once_and_never_again(gqa):
    method = load_method("kvtuner", table=entries((2, 4), (2, 4)))
    grown, whole = method.cache_for(gqa), method.cache_for(gqa)
    ids = tokens(130)
    run(gqa, grown, ids[:, :70])
    before = [x[:, :, :64].clone() for x in grown.layers[0].inner.store.read()]
    run_on = tokens(60, seed=3)
    with torch.no_grad():
        for i in range(60):
            gqa(run_on[:, i : i + 1], position_ids=torch.tensor([[70 + i]]), past_key_values=grown, use_cache=True)
    after = [x[:, :, :64] for x in grown.layers[0].inner.store.read()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    # in the first layer keys and values are the tokens' own, so one pass packs the same blocks
    run(gqa, whole, torch.cat((ids[:, :70], run_on), dim=1))
    for a, b in zip(grown.layers[0].inner.store.read(), whole.layers[0].inner.store.read()):
        near(a, b, run_off(b))


def test_four_numbers_worked_by_hand():
    x = torch.tensor([-0.5, 0.1, 0.7, 2.0]).view(1, 1, 1, 4)

    def back(bits, zero):
        return q.dequantize(q.quantize(x, bits, 4, 3, zero))[0, 0, 0].tolist()

    # scales and offsets are float16: half a unit of the last place of 0.5 and of the range
    off = torch.finfo(torch.float16).eps / 2 * (0.5 + 2.5) + half_digit(4)
    near(back(2, "float"), [-0.5, 0.3333, 0.3333, 2.0], off)
    near(back(2, "int"), [-0.8333, 0.0, 0.8333, 1.6667], off)
    for zero in ("float", "int"):
        near(back(4, zero), [-0.5, 0.166667, 0.666667, 2.0], off)


@pytest.fixture
def model():
    return tiny_llama(4, 2)


@pytest.fixture
def tables_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "PLACES", [tmp_path])
    return tmp_path


C8, C5, C3 = (Pair(8, 8), Pair(8, 8)), (Pair(8, 4), Pair(4, 4)), (Pair(4, 2), Pair(4, 2))


def chosen(cache) -> list[Pair]:
    """The bits that every layer packs with; 16 where it packs nothing."""
    found = []
    for layer in cache.layers:
        parts = layer.inner.store.parts
        found.append(Pair(parts[0].keys.scheme.bits, parts[0].values.scheme.bits) if parts else Pair(16, 16))
    return found


# of float32: per token and head, 16 codes of b bits and 4 bytes, against 64 bytes for keys and for values
@pytest.mark.parametrize(
    ("budget", "table"),
    [(1, (Pair(16, 16),) * 2), (0.9, C8), (40 / 128, C8), (0.31, C5), (28 / 128, C5), (0.2, C3), (20 / 128, C3)],
)
def test_the_budget_takes_the_most_bits_whose_bytes_fit_the_same_table_in_all_layers(
    budget, table, model, tables_folder
):
    tables_for(model, tables_folder, "per_token", C8, C5, C3)
    cache = load_method("kvtuner_per_token", budget=budget).cache_for(model)
    run(model, cache, tokens(90))
    assert tuple(chosen(cache)) == table
    cache.check_budget()


def test_a_table_that_one_layer_alone_could_not_afford_fits_over_all_layers(model, tables_folder):
    uneven = (Pair(8, 8), Pair(2, 2))  # 40 and 16 of 128 bytes
    tables_for(model, tables_folder, "per_token", uneven)
    cache = load_method("kvtuner_per_token", budget=0.22).cache_for(model)
    run(model, cache, tokens(90))
    assert tuple(chosen(cache)) == uneven
    cache.check_budget()


def test_unpacked_tokens_count_against_the_budget(model, tables_folder):
    tables_for(model, tables_folder, "kivi", C8, C3)
    method = load_method("kvtuner", budget=0.4)
    # of 96 tokens all are packed, of 95 the last 31 are not
    for n, expected in ((96, C8), (95, C3)):
        cache = method.cache_for(model)
        run(model, cache, tokens(n))
        assert tuple(chosen(cache)) == expected
        assert n == 96 or cache.report().held_prompt > cache.report().asked  # no table fits 95, so the smallest


def test_rows_of_a_padded_batch_take_the_table_that_fits_them_alone(model, tables_folder):
    tables_for(model, tables_folder, "kivi", C8, C3)
    method = load_method("kvtuner", budget=0.45)
    mask = torch.tensor([[1] * 96, [0] * 6 + [1] * 90])
    cache = method.cache_for(model)
    run(model, cache, tokens(96, rows=2), mask=mask)
    bits = [[part.keys.scheme.bits for part in layer.inner.store.parts] for layer in cache.layers]
    alone = []
    for n in (96, 90):
        one = method.cache_for(model)
        run(model, one, tokens(n))
        alone.append(chosen(one)[0].key)
    assert bits == [alone, alone]


def test_a_named_table_is_taken_whatever_the_budget_of_a_sweep(model, tables_folder):
    tables_for(model, tables_folder, "per_token", C8, C5, C3)
    cache = load_method("kvtuner_per_token", budget=0.05, table="C5.00").cache_for(model)
    run(model, cache, tokens(90))
    assert tuple(chosen(cache)) == C5
    cache.check_budget()


def test_no_tables_for_a_model_name_the_command_that_makes_them(model, tables_folder):
    for name in ("kvtuner", "kvtuner_per_token"):
        with pytest.raises(UserError, match=f"python run.py runner=tune method={name} model.path="):
            load_method(name, budget=0.2).cache_for(model)
        load_method(name, bits=4).cache_for(model)


def test_tables_of_another_checkpoint_or_another_mode_are_refused(model, tables_folder):
    folder = tables_for(model, tables_folder, "kivi", C8)
    with pytest.raises(UserError, match="no tables"):
        load_method("kvtuner_per_token", budget=0.2).cache_for(model)
    card = json.loads((folder / "card.json").read_text())
    wrong = {
        "num_hidden_layers": {**card["model"], "shape": {**card["model"]["shape"], "num_hidden_layers": 9}},
        "rope_theta": {**card["model"], "rope": {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}},
        "weights are others": {**card["model"], "weights": [0.0] * len(card["model"]["weights"])},
    }
    for said, made_for in wrong.items():
        (folder / "card.json").write_text(json.dumps({**card, "model": made_for}))
        with pytest.raises(UserError, match=said):
            load_method("kvtuner", budget=0.2).cache_for(model)
    (folder / "card.json").write_text("{")
    with pytest.raises(UserError, match="is broken"):
        load_method("kvtuner", budget=0.2).cache_for(model)


def test_tables_chosen_by_the_stand_in_for_a_score_are_refused(model, tables_folder):
    tables_for(model, tables_folder, "kivi", C8, objective="output_error")
    with pytest.raises(UserError, match="chosen by output_error"):
        load_method("kvtuner", budget=0.2).cache_for(model)


@BOTH
def test_a_prompt_may_attend_to_what_is_packed(name, gqa):
    ids = tokens(96)
    full = run(gqa, load_method("full").cache_for(gqa), ids)
    exact, lossy, same = (
        load_method(name, table=entries(*pairs), prefill_attends_dequantised=flag)
        for pairs, flag in [([(2, 2)] * 2, False), ([(2, 2)] * 2, True), ([(16, 16)] * 2, True)]
    )
    assert not exact.changes_prompt and lossy.changes_prompt
    assert torch.equal(run(gqa, exact.cache_for(gqa), ids), full)
    assert torch.equal(run(gqa, same.cache_for(gqa), ids), full)
    assert (run(gqa, lossy.cache_for(gqa), ids) - full).abs().max() > run_off()


@pytest.mark.parametrize("stage", [Stage.MID_PROMPT, Stage.ENDS_PROMPT])
def test_a_prompt_over_packed_keys_is_attention_over_what_they_stand_for(stage):
    from kernels import attend
    from tests.methods.layer import step_of

    method = load_method("kvtuner", table=entries((2, 4)), prefill_attends_dequantised=True)
    spec = dataclasses.replace(LLAMA_8B, n_layers=1, head_dim=8, prepared=[(Pair(2, 4),)])
    (cache,) = method.caches(spec, None)
    step = step_of(70, heads=4, kv_heads=2, stage=stage)
    cache.append(step)
    out = cache.attend(step)
    k, v = cache.store.read()
    assert (k[:, :, :64] != step.k[:, :, :64]).any() and torch.equal(k[:, :, 64:], step.k[:, :, 64:])
    expected = attend(step.q, k, v, step.rules, q_pos=step.pos, k_pos=step.pos[:, None])
    logit = largest_logit(step.q, k, step.rules, step.pos, step.pos[:, None])
    near(out, expected, 2 * bound(torch.float32, 70, logit, size=v.abs().max().item(), width=8))


@pytest.mark.parametrize("table", ["a\0", "half a pair \udcff", 3.5, ["C3.25"]])
def test_a_table_that_is_neither_a_name_nor_a_mapping_is_refused(table):
    with pytest.raises(UserError, match=r"^method\.table=.*: give a text or a mapping"):
        load_method("kvtuner", table=table)
