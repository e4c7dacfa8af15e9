"""A bound model under `full` is the untouched model, and under eviction the model that cannot see what was dropped."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kernels import uniform
from methods import load_method
from methods.core.bind import bind, unbound
from methods.core.contract import LayerCache, ModelSpec, Step
from methods.core.errors import UserError
from methods.core.eviction import Eviction, EvictionCache, EvictionContext
from methods.core.store import Store
from methods.core.stores.ragged import RaggedStore
from methods.full import Full
from tests.bounds import MILD, losses_off, near, run_off
from tests.tiny import ARCHITECTURES, WINDOW, feed, padded_prompt, tiny_model
from tests.turns import taking_turns

PROMPT = 21
LATER = [1, 1, 1, 4, 1, 1]  # decoding, a later turn, decoding
PADDED = [PROMPT, 14, 8]

#: where the untouched model makes the same calls, every logit has the same bits
BITWISE = {"llama-mha", "gpt_neox", "opt", "gpt2", "falcon-mha"}
#: the prompt's first piece does; later, transformers repeats or packs grouped heads in another order than we do
BITWISE_PROMPT = BITWISE | {"llama", "llama-mqa", "mistral", "qwen2", "qwen3", "gemma3", "phi3"}
#: the rest computes attention itself instead of calling SDPA: gemma2 for its softcap, gptj, mpt; or, as falcon, repeats
#: grouped heads from the start


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, PreTrainedModel]:
    """The untouched model and a copy of it to bind."""
    stock = tiny_model(request.param)
    return request.param, stock, copy.deepcopy(stock)


def full():
    return load_method("full", budget=1)


def snapkv():
    return load_method("snapkv", budget=0.5, window=4, kernel=3)


def tokens_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths and what comes later, with their mask."""
    return padded_prompt([n + sum(LATER) for n in lengths])


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with those of padding set to 0."""
    return logits * mask[..., None]


@pytest.mark.parametrize("pieces", [[PROMPT], [8, 1, 12]], ids=["whole", "chunked"])
@pytest.mark.parametrize("lengths", [[PROMPT], PADDED], ids=["single", "padded"])
def test_the_full_cache_is_the_untouched_model(pair, lengths, pieces):
    name, stock, bound = pair
    ids, mask = tokens_of(lengths)
    expected = real(feed(stock, DynamicCache(config=stock.config), ids, mask, pieces + LATER), mask)
    cache = full().cache_for(bound, prompt_len=PROMPT if len(pieces) > 1 else None)
    logits = real(feed(bound, cache, ids, mask, pieces + LATER), mask)
    assert expected.std() > 0.5  # far from a model whose logits hardly differ
    exact = logits.shape[1] if name in BITWISE else pieces[0] if name in BITWISE_PROMPT else 0
    assert torch.equal(logits[:, :exact], expected[:, :exact])
    near(logits, expected, run_off(expected, MILD))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_a_sliding_layer_that_lets_go_of_old_slots_stays_the_untouched_model(name):
    stock = tiny_model(name, max_position_embeddings=512)
    bound = copy.deepcopy(stock)
    later = [1] * (2 * WINDOW + 70) + [5, 1, 30, 1]
    ids, mask = padded_prompt([n + sum(later) for n in PADDED])
    expected = feed(stock, DynamicCache(config=stock.config), ids, mask, [PROMPT, *later])
    logits = feed(bound, full().cache_for(bound), ids, mask, [PROMPT, *later])
    near(real(logits, mask), real(expected, mask), run_off(expected, MILD))


@torch.no_grad()
def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache, **knobs) -> Tensor:
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, use_cache=True, max_new_tokens=6, do_sample=False, **knobs
    )


@pytest.mark.parametrize("knobs", [{}, {"prefill_chunk_size": 8}, {"num_beams": 3}], ids=["greedy", "chunked", "beams"])
@pytest.mark.parametrize("lengths", [[PROMPT], PADDED], ids=["single", "padded"])
def test_generate_gives_the_untouched_models_tokens(pair, lengths, knobs):
    _, stock, bound = pair
    ids, mask = padded_prompt(lengths)
    expected = generated(stock, ids, mask, DynamicCache(config=stock.config), **knobs)
    cache = full().cache_for(bound, prompt_len=PROMPT if "prefill_chunk_size" in knobs else None)
    assert torch.equal(generated(bound, ids, mask, cache, **knobs), expected)


def test_a_second_turn_on_the_same_cache_and_on_a_copy_of_it_gives_the_untouched_models_tokens(pair):
    _, stock, bound = pair
    ids, mask = padded_prompt(PADDED)
    ours, theirs = full().cache_for(bound), DynamicCache(config=stock.config)
    first = generated(stock, ids, mask, theirs)
    assert torch.equal(generated(bound, ids, mask, ours), first)
    with torch.no_grad():
        copied = copy.deepcopy(ours)
    question, _ = padded_prompt([4, 4, 4], seed=1)
    ids = torch.cat((first, question), dim=1)
    mask = torch.cat((mask, torch.ones_like(ids[:, mask.shape[1] :])), dim=1)
    expected = generated(stock, ids, mask, theirs)
    assert torch.equal(generated(bound, ids, mask, ours), expected)
    assert torch.equal(generated(bound, ids, mask, copied), expected)
    assert ours.layers[0].inner.store.k.data_ptr() != copied.layers[0].inner.store.k.data_ptr()


def test_a_row_whose_later_turn_is_padded_equals_the_row_alone(pair):
    # transformers counts a sliding window in columns, padding included; here it is a row's own tokens
    _, _, bound = pair
    turns = [PADDED, [7, 1, 3], [1, 1, 1], [2, 5, 4], [1, 1, 1]]
    pieces = [max(turn) for turn in turns]
    ids, mask = (torch.cat(x, dim=1) for x in zip(*[padded_prompt(t, i) for i, t in enumerate(turns)], strict=True))
    together = feed(bound, full().cache_for(bound), ids, mask, pieces)
    for b in range(3):
        row = ids[b][mask[b] > 0][None]
        alone = feed(bound, full().cache_for(bound), row, torch.ones_like(row), [turn[b] for turn in turns])
        near(together[b][mask[b] > 0], alone[0], run_off(alone, MILD))


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer, from the configuration."""
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if config.model_type == "mistral":
        kinds = ["sliding_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def what_is_seen(model: PreTrainedModel, held: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Per layer who sees what, [B, Hq, T, T]: prompt queries see the prompt before them, later ones what was held."""
    B, T = mask.shape
    Hq = model.config.num_attention_heads
    back = torch.arange(T)[:, None] - torch.arange(T)  # [T, T]
    out = []
    for pos, window in zip(held, windows_of(model), strict=True):
        H = pos.shape[1]
        keep = torch.zeros(B, H, T, dtype=torch.bool)
        keep[:, :, PROMPT:] = True
        for b in range(B):
            first = int((mask[b] == 0).sum())  # the column of position 0
            for h in range(H):
                keep[b, h, pos[b, h][pos[b, h] >= 0].long() + first] = True
        seen = (back >= 0) & (mask[:, None, None] > 0)
        if window is not None:
            seen = seen & (back < window)
        seen = seen.repeat(1, Hq, 1, 1)  # [B, Hq, T, T]
        seen[:, :, PROMPT:] &= keep.repeat_interleave(Hq // H, dim=1)[:, :, None]
        out.append(seen)
    return out


@dataclass
class PerHead(Eviction):
    """Random scores; head h keeps h slots fewer than the budget allows."""

    def score(self, store: Store, step: Step, cut: EvictionContext) -> Tensor:
        heads = torch.arange(store.pos.shape[1])[:, None]
        scores = uniform(0, step.samples[:, None, None], torch.tensor(step.layer), heads, store.pos)
        best = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        return scores.masked_fill(best >= max(map(self.slots, cut.prompt)) - heads, -torch.inf)


def masked_feed(model: PreTrainedModel, seen: list[Tensor], ids: Tensor, mask: Tensor, pieces: list[int]) -> Tensor:
    """Logits of an eager model that keeps everything, when each layer and head is told what to see."""
    done = [0] * len(seen)

    def tell(module, args, kwargs):
        layer, T = module.layer_idx, (args[0] if args else kwargs["hidden_states"]).shape[1]
        done[layer] += T
        now = seen[layer][:, :, done[layer] - T : done[layer], : done[layer]]
        hidden = torch.zeros(now.shape).masked_fill(~now, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = ~now if model.config.model_type == "mpt" else hidden
        return args, kwargs

    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    hooks = [layer.register_forward_pre_hook(tell, with_kwargs=True) for layer in layers]
    try:
        return feed(model, DynamicCache(), ids, mask, pieces)  # without a config: sliding layers keep everything too
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "lengths", "store"),
    taking_turns(list(ARCHITECTURES), [[PROMPT], PADDED], ["rectangular", "ragged"], of=2),
)
def test_an_evicting_cache_is_the_model_that_cannot_see_what_was_dropped(name, lengths, store):
    bound, eager = tiny_model(name), tiny_model(name, attn_implementation="eager")
    ids, mask = tokens_of(lengths)
    method = snapkv() if store == "rectangular" else PerHead(budget=0.5, store=RaggedStore)
    cache = method.cache_for(bound)
    prompt = feed(bound, cache, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT])
    held = [layer.inner.store.pos.clone() for layer in cache.layers]
    later = feed(bound, cache, ids, mask, LATER, start=PROMPT)
    seen = what_is_seen(bound, held, mask)
    expected = masked_feed(eager, seen, ids, mask, [PROMPT, *LATER])
    everything = feed(tiny_model(name), DynamicCache(config=bound.config), ids, mask, [PROMPT, *LATER])
    assert real(everything - expected, mask)[:, PROMPT:].abs().max() > 1e-2  # what was dropped is missed
    near(real(torch.cat((prompt, later), dim=1), mask), real(expected, mask), run_off(expected, MILD))


class Watch(EvictionCache):
    """Remembers the steps that went through it."""

    def append(self, step: Step) -> None:
        super().append(step)
        self.__dict__.setdefault("steps", []).append(step)


@dataclass
class Watching(Full):
    """The full cache, asking for everything that a step can carry."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "rope"})

    def caches(self, spec: ModelSpec, prompt_len: int | None) -> list[LayerCache]:
        return [Watch(self, prompt_len) for _ in range(spec.n_layers)]


def projected_keys(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """The attention module's own keys before RoPE, [B, H, T, D], from its input."""
    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    module = attention[layer]
    kind, (B, T) = model.config.model_type, hidden.shape[:2]
    if kind == "phi3":
        config = model.config
        width = config.num_key_value_heads * module.head_dim
        k = module.qkv_proj(hidden)[..., config.num_attention_heads * module.head_dim :][..., :width]
    elif kind == "gpt_neox":
        k = module.query_key_value(hidden).view(B, T, model.config.num_attention_heads, -1).chunk(3, dim=-1)[1]
        return k.transpose(1, 2)
    elif kind == "gpt2":
        k = module.c_attn(hidden).chunk(3, dim=-1)[1]
    elif kind == "mpt":
        k = module.Wqkv(hidden).chunk(3, dim=-1)[1]
    elif kind == "falcon":
        k = module._split_heads(module.query_key_value(hidden))[1].transpose(1, 2)
        return k[:, :: k.shape[1] // bind(model).n_kv_heads]
    else:
        k = module.k_proj(hidden)
    k = k.view(B, T, -1, bind(model).head_dim)
    k = module.k_norm(k) if hasattr(module, "k_norm") else k
    return k.transpose(1, 2)


SCALED = {
    "llama3": dict(
        rope_type="llama3", rope_theta=1e4, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "yarn": dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, attention_factor=1.3, original_max_position_embeddings=32
    ),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, *SCALED])
def test_keys_before_rope_are_the_modules_own_projection(name):
    model = tiny_model("llama", rope_parameters=SCALED[name]) if name in SCALED else tiny_model(name)
    ids, mask = tokens_of(PADDED)
    cache = Watching(budget=1).cache_for(model, prompt_len=PROMPT)
    feed(model, cache, ids, mask, [8, 1, 12, *LATER])
    rotary = name in SCALED or name not in ("opt", "gpt2", "mpt")
    for layer in cache.layers:
        assert len(layer.inner.steps) == 3 + len(LATER)
        for step in layer.inner.steps:
            assert step.hidden.shape == (3, step.q.shape[2], 32)
            assert (step.cos is not None) == rotary
            expected = projected_keys(model, layer.index, step.hidden)
            near(step.k_raw, expected, run_off(expected, MILD))
        turned = layer.inner.steps[-1]
        assert ((turned.k - turned.k_raw).abs().max() > run_off(turned.k, MILD)) == rotary


@torch.no_grad()
@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama3", "yarn", "linear"])
def test_a_layers_rope_turns_keys_as_the_model_does(name):
    model = tiny_model("llama", rope_parameters=SCALED[name]) if name in SCALED else tiny_model(name)
    ids, mask = tokens_of(PADDED)
    cache = Watching(budget=1).cache_for(model)
    feed(model, cache, ids, mask, [PROMPT, *LATER])
    for layer, rope in zip(cache.layers, cache.spec.ropes, strict=True):
        assert (rope is None) == (name in ("opt", "gpt2", "mpt"))
        for step in layer.inner.steps if rope else ():
            H = step.k.shape[1]
            turned = rope.rotate(step.k_raw, step.pos.clamp_min(0)[:, None].expand(-1, H, -1))
            turned *= SCALED["yarn"]["attention_factor"] if name == "yarn" else 1
            seen = (step.pos >= 0)[:, None, :, None]
            near(turned * seen, step.k * seen, run_off(step.k, MILD))


@torch.no_grad()
def test_what_the_spec_says_is_what_a_step_brings(pair):
    _, _, bound = pair
    ids, mask = tokens_of([PROMPT])
    cache = Watching(budget=1).cache_for(bound)
    feed(bound, cache, ids, mask, [PROMPT, *LATER])
    spec = bind(bound)
    assert (spec.n_layers, spec.n_heads, spec.max_positions) == (2, 4, 128)
    assert spec.alibi == (bound.config.model_type == "mpt")
    for layer in cache.layers:
        for step in layer.inner.steps:
            assert step.q.shape[1] == spec.n_heads
            assert (step.k.shape[1], step.k.shape[3]) == (spec.n_kv_heads, spec.head_dim)
            assert step.k.dtype == spec.dtype


def test_positions_are_each_rows_own_and_padding_has_none():
    model = tiny_model("llama")
    ids, mask = padded_prompt([5, 3])
    mask = torch.cat((mask, torch.tensor([[1, 1, 1], [0, 1, 1]]), torch.ones(2, 1, dtype=torch.long)), dim=1)
    ids = torch.cat((ids, torch.ones(2, 4, dtype=torch.long)), dim=1)
    cache = Watching(budget=1).cache_for(model, prompt_len=5, samples=[9, 4])
    feed(model, cache, ids, mask, [2, 3, 3, 1])
    steps = cache.layers[1].inner.steps
    assert [s.pos.tolist() for s in steps] == [
        [[0, 1], [-1, -1]], [[2, 3, 4], [0, 1, 2]], [[5, 6, 7], [-1, 3, 4]], [[8], [5]]
    ]  # fmt: skip
    assert [s.seen.tolist() for s in steps] == [[0, 0], [2, 0], [5, 3], [8, 5]]
    assert [s.stage.value for s in steps] == ["mid_prompt", "ends_prompt", "turn", "decode"]
    assert [s.padded for s in steps] == [True, False, True, False]
    assert all(s.samples.tolist() == [9, 4] for s in steps)
    assert cache.get_seq_length() == 9


def test_a_number_of_samples_that_is_not_the_batchs_is_refused():
    model = tiny_model("llama")
    ids, mask = padded_prompt([5, 3])
    with pytest.raises(UserError, match="3 numbers for a batch of 2 rows"):
        feed(model, full().cache_for(model, samples=[1, 2, 3]), ids, mask, [5])


_SMALL = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
        ("codegen", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)),
        ("falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)),
        ("gpt_oss", dict(_SMALL, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)),
        ("llama4_text", dict(_SMALL, num_key_value_heads=2, attention_chunk_size=8, num_local_experts=2)),
        ("mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
    ],
)
def test_an_architecture_that_cannot_be_bound_is_refused_by_name_and_left_as_it_was(kind, knobs):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, **knobs)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, _ = padded_prompt([9])
    with torch.no_grad():
        before = model(ids).logits
        for _ in range(2):
            with pytest.raises(UserError, match=kind):
                full().cache_for(model)
        assert torch.equal(model(ids).logits, before)
        with unbound(model):
            assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_unbound_gives_the_untouched_model_and_binding_comes_back_after_it(pair):
    _, stock, bound = pair
    ids, mask = tokens_of(PADDED)
    pieces = [PROMPT, *LATER]
    expected = feed(stock, DynamicCache(config=stock.config), ids, mask, pieces)
    bind(bound)
    with unbound(bound) as model:
        assert model is bound
        assert torch.equal(feed(bound, DynamicCache(config=bound.config), ids, mask, pieces), expected)
        with unbound(bound):
            assert torch.equal(feed(bound, DynamicCache(config=bound.config), ids, mask, pieces), expected)
        assert torch.equal(feed(bound, DynamicCache(config=bound.config), ids, mask, pieces), expected)
    logits = feed(bound, full().cache_for(bound), ids, mask, pieces)
    near(real(logits, mask), real(expected, mask), run_off(expected, MILD))
    with pytest.raises(ZeroDivisionError), unbound(bound):
        1 / 0  # noqa: B018
    logits = feed(bound, full().cache_for(bound), ids, mask, pieces)
    near(real(logits, mask), real(expected, mask), run_off(expected, MILD))


@torch.no_grad()
def test_our_cache_under_the_untouched_attention_fails_instead_of_answering(pair):
    _, _, bound = pair
    ids, mask = padded_prompt([9])
    cache = full().cache_for(bound)
    with unbound(bound), pytest.raises((AttributeError, TypeError, UserError)):
        feed(bound, cache, ids, mask, [9])


@torch.no_grad()
def test_binding_twice_and_binding_a_copy_change_nothing(pair):
    _, stock, bound = pair
    ids, mask = tokens_of(PADDED)
    weights = {name: p.clone() for name, p in bound.named_parameters()}
    spec = bind(bound)
    first = feed(bound, full().cache_for(bound), ids, mask, [PROMPT, *LATER])
    hooks = sum(len(m._forward_pre_hooks) for m in bound.modules())
    assert bind(bound) is spec
    assert sum(len(m._forward_pre_hooks) for m in bound.modules()) == hooks
    twin = copy.deepcopy(bound)
    assert torch.equal(feed(bound, full().cache_for(bound), ids, mask, [PROMPT, *LATER]), first)
    assert torch.equal(feed(twin, full().cache_for(twin), ids, mask, [PROMPT, *LATER]), first)
    for name, p in bound.named_parameters():
        assert torch.equal(p, weights[name]) and p.requires_grad
    assert {name for name, _ in stock.named_modules()} == {name for name, _ in bound.named_modules()}


@torch.no_grad()
@pytest.mark.parametrize("method", ["full", "snapkv", "per head"])
def test_a_row_that_takes_anothers_place_brings_its_positions_and_its_sample(method):
    model = tiny_model("llama")
    ids, mask = tokens_of(PADDED)
    rows = [2, 0, 0]
    made = {"full": full(), "snapkv": snapkv(), "per head": PerHead(budget=0.5, store=RaggedStore)}[method]
    whole = feed(model, made.cache_for(model), ids, mask, [PROMPT, *LATER])
    cache = made.cache_for(model, samples=[0, 1, 2])
    feed(model, cache, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT])
    cache.reorder_cache(torch.tensor(rows))
    later = feed(model, cache, ids[rows], mask[rows], LATER, start=PROMPT)
    near(later, whole[rows, PROMPT:], run_off(whole, MILD))
    assert cache._counts.tolist() == [n + sum(LATER) for n in (8, PROMPT, PROMPT)]
    assert cache.samples.tolist() == rows


@torch.no_grad()
def test_beams_of_an_evicting_cache_go_on_from_their_own_parents():
    # each beam's score is that of its tokens fed on their own
    model = tiny_model("llama")
    ids, mask = padded_prompt(PADDED)
    for method in (snapkv(), PerHead(budget=0.5, store=RaggedStore)):
        cache = method.cache_for(model, samples=[b for b in range(3) for _ in range(3)])
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, num_beams=3, num_return_sequences=3,
            do_sample=False, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
        rows = [b for b in range(3) for _ in range(3)]
        whole = torch.cat((mask[rows], torch.ones(9, 6, dtype=torch.long)), dim=1)
        again = method.cache_for(model, samples=rows)
        logits = feed(model, again, out.sequences, whole, [PROMPT] + [1] * 6)[:, PROMPT - 1 : -1]
        steps = logits.log_softmax(-1).gather(2, out.sequences[:, PROMPT:, None])[..., 0]
        near(steps.sum(-1), out.sequences_scores, losses_off(6))


def test_what_a_method_prepares_for_a_model_reaches_its_caches_on_that_model_only():
    class Prepares(Full):
        calls = 0

        def prepare(self, model):
            Prepares.calls += 1
            return model.config.num_key_value_heads

        def caches(self, spec, prompt_len):
            seen.append(spec.prepared)
            return super().caches(spec, prompt_len)

    seen, method = [], Prepares()
    grouped, ungrouped = tiny_model("llama"), tiny_model("llama-mha")
    for model in (grouped, ungrouped, grouped):
        method.cache_for(model)
    assert seen == [2, 4, 2] and Prepares.calls == 2
