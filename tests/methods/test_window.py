"""The plain window: the newest tokens, as many as the budget."""

import torch

from methods import load_method
from tests.bounds import near, run_off
from tests.methods.conftest import kept, run, tiny_llama


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def test_the_newest_tokens_stay_at_the_prompts_end_and_at_every_step(gqa):
    cache = load_method("window", budget=0.2).cache_for(gqa)
    run(gqa, cache, tokens(40))
    assert kept(cache, 1) == list(range(32, 40))
    for i in range(40, 60):
        with torch.no_grad():
            gqa(tokens(1, seed=i), past_key_values=cache, use_cache=True)
        assert kept(cache, 1, head=1) == list(range(i - 7, i + 1))


def test_it_is_streaming_llm_without_sinks(gqa):
    ids, new = tokens(40), tokens(20, seed=2)
    ours = run(gqa, load_method("window", budget=9).cache_for(gqa), ids, new=new)
    theirs = run(gqa, load_method("streaming_llm", budget=9, sinks=0).cache_for(gqa), ids, new=new)
    near(ours, theirs, run_off(theirs))


def test_per_chunk_a_prompt_token_by_token_is_a_forward_over_the_last_tokens_alone():
    # in a model of one layer keys and values depend on the token alone
    model = tiny_llama(4, 2, n_layers=1)
    ids = tokens(40)
    method = load_method("window", budget=0.25, evict="per_chunk")
    actual = run(model, method.cache_for(model, prompt_len=40), ids, chunks=[1] * 40)
    expected = run(model, load_method("full").cache_for(model), ids[:, -11:])
    near(actual[:, -1], expected[:, -1], run_off(expected[:, -1]))
