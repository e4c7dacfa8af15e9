"""Prompt templates: LongBench's, read from the installed lm_eval and set right, and those of a split of one's own."""

import hashlib
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from methods.core.errors import UserError


@dataclass(frozen=True)
class Template:
    """A prompt with one place for the context and, after it, any number of places for the input."""

    before: str
    after: str
    input_mark: str

    @classmethod
    def parse(cls, text: str, context_mark: str, input_mark: str) -> "Template":
        """Raises ValueError unless the context has one place, and the input none before it."""
        before, mark, after = text.partition(context_mark)
        if not mark or context_mark in after or input_mark in before:
            raise ValueError(f"a prompt holds {context_mark} once, before any {input_mark}")
        return cls(before, after, input_mark)

    def fill(self, context: str, question: str) -> tuple[str, str]:
        """The prompt in two parts, cut right after the context; marks inside the texts stay as they are."""
        return self.before + context, self.after.replace(self.input_mark, question)

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the template's SHA-256, whatever its marks are called."""
        text = f"{self.before}\0{self.after.replace(self.input_mark, chr(1))}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]


# of every template after its correction; all equal the benchmark's own, character for character
DIGESTS: dict[str, str] = {
    "narrativeqa": "26092bdd",
    "qasper": "55e9fc59",
    "multifieldqa_en": "45ab8d3e",
    "multifieldqa_zh": "0e8a7570",
    "hotpotqa": "46f50d4a",
    "2wikimqa": "46f50d4a",
    "musique": "46f50d4a",
    "dureader": "b52b75d7",
    "gov_report": "8e8d4a08",
    "qmsum": "acc7c809",
    "multi_news": "663537ac",
    "vcsum": "065be6c2",
    "trec": "3e02e6db",
    "triviaqa": "554211c0",
    "samsum": "172bede6",
    "lsht": "a752430c",
    "passage_count": "ef1d655f",
    "passage_retrieval_en": "66a86358",
    "passage_retrieval_zh": "c9242c98",
    "lcc": "b9333c95",
    "repobench-p": "ff016c6a",
}


class _Loader(yaml.SafeLoader):
    """Reads lm_eval's files without importing what their `!function` tags point to."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def lm_eval_version() -> str:
    """The version that the templates come from. Raises UserError if lm_eval is not installed."""
    lm_eval_folder()
    return metadata.version("lm_eval")


def lm_eval_task(name: str, group: str = "longbench") -> dict[str, Any]:
    """lm_eval's own description of a task of a group, functions left out; LongBench's names may end in `_e`."""
    path = lm_eval_folder(group) / f"{name}.yaml"
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{group}: the installed lm_eval has no {path} ({error.strerror}); {_WANTED}") from error


def longbench_template(name: str) -> Template:
    """The benchmark's own template of a subset. Raises UserError if the installed lm_eval has another one."""
    parent = name.removesuffix("_e")
    text = _corrected(parent, lm_eval_task(name)["doc_to_text"])
    template = Template.parse(text, "{{context}}", "{{question}}")
    if template.digest != DIGESTS[parent]:
        raise UserError(f"longbench: lm_eval {lm_eval_version()} words the prompt of {name} in another way; {_WANTED}")
    return template


_WANTED = "install lm_eval 0.4.13, whose templates are known"


def lm_eval_folder(group: str = "longbench") -> Path:
    """Where lm_eval keeps a group of tasks. Raises UserError if lm_eval is not installed."""
    spec = find_spec("lm_eval")  # finds it without running it, which takes seconds
    if spec is None or spec.origin is None:
        raise UserError(f"{group}: the prompts are read from lm_eval, which is not installed; {_WANTED}")
    return Path(spec.origin).parent / "tasks" / group


def _corrected(name: str, text: str) -> str:
    """Where lm_eval's white space differs from the benchmark's; the benchmark's own oddities stay."""
    if name in ("triviaqa", "samsum"):
        before, _, after = text.partition("{{context}}")
        return f"{before}{{{{context}}}}\n\n{after.lstrip(chr(10))}"
    if name in ("lcc", "repobench-p"):
        return text.rstrip("\n") + "\n"
    if name in ("passage_count", "passage_retrieval_en"):
        return text.rstrip(" ") + " "
    return text
