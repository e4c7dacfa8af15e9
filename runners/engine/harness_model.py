"""lm_eval's model of the Hugging Face library on a compressed cache, for its own evaluation.

    lm = cached_lm(load_method("snapkv", budget=0.25), pretrained="path/to/model", batch_size=1)
    lm_eval.simple_evaluate(lm, tasks=["piqa"], num_fewshot=5)

`task=lm_eval` needs none of this and records every sample beside the full cache's; here lm_eval keeps the books, its
groups and its metrics of whole sets included.
"""

from __future__ import annotations

from typing import Any

from methods.core.contract import Method
from runners.engine.choices import EncodedChoice, compare_choices, fit


def cached_lm(method: Method, *args: Any, stride: int | None = None, **kwargs: Any) -> Any:
    """An HFLM that scores continuations and generates answers through the method's cache.

    stride: tokens of a continuation that are fed at once; None: all.  Everything else goes to HFLM.
    A method that runs the model again after the prompt does so for continuations, not where answers are generated.
    """
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm

    class CachedLM(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            """Requests of equal prompts share one compressed cache."""
            groups: dict[tuple[int, ...], list[tuple[int, EncodedChoice]]] = {}
            for i, (_, prompt, text) in enumerate(requests):
                asked = fit(prompt, len(prompt), text, self.max_length)
                groups.setdefault(asked.prompt, []).append((i, asked))
            by_request: dict[int, tuple[float, bool]] = {}
            for sample, members in enumerate(tqdm(groups.values(), disable=disable_tqdm)):
                choices = [asked for _, asked in members]
                (scores,), _, _ = compare_choices(self.model, method, [choices], [sample], stride=stride)
                for (i, _), score in zip(members, scores, strict=True):
                    by_request[i] = score
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
            return [by_request[i] for i in range(len(requests))]

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            cache = method.cache_for(self.model)
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **options)

    return CachedLM(*args, **kwargs)
