"""What methods have made of a model, once each, and what they may know of its tokens."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.core.binding.projections import Projections, projections_of
from methods.core.contract import SPANS, Method, ModelSpec, Vocabulary
from methods.core.errors import UserError


class Prepared:
    """What methods have made of a model in `prepare`, each for as long as the method lives."""

    def __init__(self) -> None:
        self.prepared: dict[int, tuple[weakref.ref[Method], Any]] = {}

    def by(self, method: Method, model: PreTrainedModel) -> Any:
        """What this very method made, which it does once: one with the same knobs may edit the model otherwise."""
        key = id(method)
        if key not in self.prepared or self.prepared[key][0]() is not method:
            prepared, before = self.prepared, _weights(model)
            value = method.prepare(model)
            if not method.edits_model and _weights(model) != before:
                raise UserError(f"method={method.name}: its prepare changed the model, which other methods use too; a "
                                "method that edits weights says so: edits_model = True")  # fmt: skip
            prepared[key] = (weakref.ref(method, lambda gone: prepared.pop(key, None)), value)
        return self.prepared[key][1]

    def __reduce__(self) -> tuple[type[Prepared], tuple[()]]:
        return Prepared, ()  # a copy of the model, or one from a file, knows no method yet


def _weights(model: PreTrainedModel) -> list[tuple[str, int, int]]:
    """Where every parameter lies and how often it was written to, as far as PyTorch counts it."""
    return [(name, one.data_ptr(), 0 if one.is_inference() else one._version) for name, one in model.named_parameters()]


def spec_for(
    method: Method,
    model: PreTrainedModel,
    binding: dict[str, Any],
    spans: Tensor | None,
    answers: Sequence[Sequence[int]] | None = None,
) -> ModelSpec:
    """What the method may know of the bound model, and has made of it; spans, answers: as the cache was given them.

    Raises UserError where it needs something that is not known.
    """
    spec: ModelSpec = binding["spec"]
    unknown = [i for i, turning in enumerate(binding["turnings"]) if not turning.known]
    if "rope" in method.needs and unknown:
        raise UserError(
            f"{method.name}: needs keys as they are before RoPE, and how layer {unknown[0]} of {spec.name} turns "
            "them is not known"
        )
    if "spans" in method.needs and spans is None:
        raise UserError(
            f"{method.name}: needs to know which part of a prompt is {' or '.join(SPANS)}; "
            'method.cache_for(model, spans=[{"context": (first, end), ...}, ...]) says so for every row'
        )
    if "answers" in method.needs and answers is None:
        raise UserError(
            f"{method.name}: looks ahead at what the full cache answers; "
            "method.cache_for(model, answers=[[token, ...], ...]) says so for every row"
        )
    return replace(
        spec,
        prepared=model.__dict__.setdefault("_kvfrontier_prepared", Prepared()).by(method, model),
        vocabulary=vocabulary_for(method, model),
        weights=partial(_projections, weakref.ref(model), binding),
    )


def _projections(model: weakref.ref[PreTrainedModel], binding: dict[str, Any]) -> Sequence[Projections]:
    bound = model()
    assert bound is not None, "the model is gone"
    return projections_of(bound, binding["spec"], binding["kind"], binding["modules"])


#: where a model keeps its tokenizer, and the vocabulary that was made of it
TOKENIZER, VOCABULARY = "_kvfrontier_tokenizer", "_kvfrontier_vocabulary"


def remember(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let methods that need the vocabulary have this tokenizer's."""
    if model.__dict__.get(TOKENIZER) is not tokenizer:
        model.__dict__[TOKENIZER] = tokenizer
        model.__dict__.pop(VOCABULARY, None)


def vocabulary_for(method: Method, model: PreTrainedModel) -> Vocabulary | None:
    """The vocabulary, made once, where the method asks for it. Raises UserError if the tokenizer is not known."""
    if "vocabulary" not in method.needs:
        return None
    if (tokenizer := model.__dict__.get(TOKENIZER)) is None:
        raise UserError(
            f"{method.name}: needs to know which tokens are special, punctuation or newlines; "
            "method.cache_for(model, tokenizer=tokenizer) says so"
        )
    if VOCABULARY not in model.__dict__:
        size = model.get_input_embeddings().weight.shape[0]
        model.__dict__[VOCABULARY] = Vocabulary.of(tokenizer, size, model.device)
    return model.__dict__[VOCABULARY]
