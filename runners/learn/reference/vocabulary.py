"""The reference model's tokenizer: byte-level BPE, one token per digit, trained on generated documents and prose."""

from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from runners.learn.reference.long_answers import LONG
from tasks.documents import KINDS, Pool, prose

CORPUS = (
    "pairs", "table", "facts", "needle", "chains", "bridge", "findings", "labels", "passages", "code",
)  # fmt: skip
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def train_tokenizer(
    size: int, seed: int, documents: int, window: int, kinds: Sequence[str] = CORPUS
) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` entries that puts BOS before every text; `window` is the longest text it announces.

    kinds: of the documents that it is trained on.
    """
    tokenizer = Tokenizer(models.BPE())
    # one token per digit; the first digit of a number takes the blank along, so that no blank stands alone
    digits, words = pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, documents, kinds), trainer)
    bos = SPECIALS["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=window, clean_up_tokenization_spaces=False, **SPECIALS
    )


def _corpus(seed: int, documents: int, names: Sequence[str]) -> Iterator[str]:
    kinds = [(KINDS | LONG)[name] for name in names]
    for i in range(documents):
        document = kinds[i % len(kinds)](Pool(np.random.default_rng([seed, i])), 1000, 4)
        yield document.opening
        yield from (turn.question + turn.answer for turn in document.turns)
    # one paragraph in four: names are what has to be cheap
    yield from prose("train")[::4]
