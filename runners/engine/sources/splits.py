"""How a byte-level tokenizer cuts text before it merges bytes, by the name that a GGUF file gives it.

transformers cuts as GPT-2 does wherever it does not know the name, and in older versions always: the tokens are then
others than those that the model was trained on, such as two line ends before a digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# as in llama.cpp, whose names these are: up to three digits are one piece, or each is its own
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"

_PATTERNS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
}
_GPT2 = ("gpt-2", "gpt2", "olmo", "mpt", "jais", "phi-2")
# older versions of transformers mix them up
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def unknown(said: Mapping[str, Any]) -> str | None:
    """The name of a cut that nothing here makes, by the `tokenizer.ggml` settings of a file; None if all is well."""
    name = said.get("pre")
    if said.get("model") != "gpt2" or name is None or name in (*_PATTERNS, *_GPT2, *_DIGITS, *_by_transformers()):
        return None
    return str(name)


def settle(tokenizer: PreTrainedTokenizerBase, said: Mapping[str, Any]) -> None:
    """Make the tokenizer cut text as the file says, and name the file's special tokens."""
    cut = _cut(str(said.get("pre"))) if said.get("model") == "gpt2" else None
    if cut is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = cut
    for name, key in _SPECIAL.items():
        token = said.get(f"{key}_token_id")
        if token is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))


def _cut(name: str) -> PreTokenizer | None:
    """None: as transformers has made it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name in _PATTERNS:
        pieces = Split(Regex(_PATTERNS[name]), behavior="isolated")
        return Sequence([pieces, ByteLevel(add_prefix_space=False, use_regex=False)])
    if name in _DIGITS:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    return ByteLevel(add_prefix_space=False) if name in _GPT2 else None


def _by_transformers() -> Mapping[str, str]:
    """The names that this version of transformers knows."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return GGUF_PRE_TOKENIZER_SPLITS
