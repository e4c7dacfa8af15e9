"""lm_eval's own evaluation through a compressed cache, against its own model on the same items."""

import copy
from typing import Any

import pytest

from methods import load_method
from methods.core.bind import unbound
from runners.engine.harness_model import cached_lm
from tasks.lm_eval.task import LmEval
from tests.bounds import losses_off, near
from tests.tasks.choice_items import put, write

GENERATING = """
task: story
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: answer
generation_kwargs: {{max_gen_toks: 6, until: ["\\n"], do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def model(sharp_model):
    return sharp_model


def evaluated(lm: Any, task: LmEval) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    loaded = {name: copy.deepcopy(one) for name, one in task._loaded.items()}
    result = evaluate(lm=lm, task_dict={"tasks": loaded}, bootstrap_iters=0, log_samples=True)
    samples = {name: [one["filtered_resps"] for one in own] for name, own in result["samples"].items()}
    scores = {name: {k: v for k, v in own.items() if k != "alias"} for name, own in result["results"].items()}
    return {"results": scores, "samples": samples}


def cached(model, tokenizer, method: Any, **how: Any) -> Any:
    return cached_lm(method, pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048, **how)


def plain(model, tokenizer) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048)


def test_the_full_cache_gives_lm_evals_own_table(model, tiny_tokenizer, tmp_path):
    task = LmEval(["piqa", "openbookqa", "winogrande"], write(tmp_path), shots=1)
    ours = evaluated(cached(model, tiny_tokenizer, load_method("full")), task)
    with unbound(model):
        own = evaluated(plain(model, tiny_tokenizer), task)
    assert ours["results"] == own["results"]
    for name, samples in ours["samples"].items():
        for a, b in zip(samples, own["samples"][name], strict=True):
            near([x for x, _ in a], [x for x, _ in b], losses_off(20))
            assert [x for _, x in a] == [x for _, x in b]


def test_a_small_budget_is_felt(model, tiny_tokenizer, tmp_path):
    task = LmEval("piqa", write(tmp_path), shots=1)
    full, small = (
        evaluated(cached(model, tiny_tokenizer, method), task)["samples"]["piqa"]
        for method in (load_method("full"), load_method("snapkv", budget=8, window=2, kernel=1))
    )
    assert all(abs(a[0][0] - b[0][0]) > 1e-4 for a, b in zip(full, small, strict=True))


def test_answers_are_generated_through_the_cache(model, tiny_tokenizer, tmp_path, monkeypatch):
    rows = [{"text": "the cat sat on a mat and read about a long river", "answer": "a"}, {"text": "mat", "answer": "b"}]
    put(tmp_path / "rows.jsonl", rows)
    (tmp_path / "story.yaml").write_text(GENERATING.format(rows=tmp_path / "rows.jsonl"))
    task = LmEval(include=str(tmp_path), trust_include=True)
    ours = evaluated(cached(model, tiny_tokenizer, load_method("full")), task)
    with unbound(model):
        own = evaluated(plain(model, tiny_tokenizer), task)
    assert ours["samples"] == own["samples"]
    made = []
    method = load_method("snapkv", budget=8, window=2, kernel=1)
    cache_for = method.cache_for
    monkeypatch.setattr(method, "cache_for", lambda *a, **k: made.append(cache_for(*a, **k)) or made[-1])
    evaluated(cached(model, tiny_tokenizer, method), task)
    assert len(made) == len(rows) and min(cache.report().held_end for cache in made) > 0
