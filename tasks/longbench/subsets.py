"""LongBench's 21 subsets, and those of a split of one's own: how each is prompted, run and scored.

Paper: Bai et al. 2024, LongBench, arXiv:2308.14508, table 1; lengths and rules as in the benchmark's own code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from methods.core.errors import UserError
from methods.core.reading import read_text
from methods.core.typed import settings
from tasks.data.rows import wrong
from tasks.prompts import Template
from tasks.scoring import metrics

FEW_SHOT, CODE = "few-shot", "code"
CATEGORIES = ("single-doc QA", "multi-doc QA", "summarization", FEW_SHOT, "synthetic", CODE)


@dataclass(frozen=True)
class Subset:
    """What is the same for all samples of a subset.

    metric: a name in metrics.METRICS.
    max_new_tokens: longest answer.
    language: "en", "zh" or "code"; "" where results are not split by language.
    first_line: only the first line of the answer is scored.
    in_e: LongBench-E has this subset as well.
    uses_input: the prompt holds the record's `input`.
    min_new_tokens, stop_at_newline: as in tasks.base.Example.
    plain: no chat template is put around the prompt, whatever the category.
    default: taken where no subset is asked for; where none is, all are.
    """

    category: str
    metric: str
    max_new_tokens: int
    language: str = ""
    first_line: bool = False
    in_e: bool = False
    uses_input: bool = True
    min_new_tokens: int = 0
    stop_at_newline: bool = False
    plain: bool = False
    default: bool = False

    @property
    def chat(self) -> bool:
        """Few-shot and code prompts stay plain text also for chat models."""
        return not self.plain and self.category not in (FEW_SHOT, CODE)


_SINGLE, _MULTI, _SUMMARY, _, _SYNTHETIC, _ = CATEGORIES

LONGBENCH: dict[str, Subset] = {
    "narrativeqa": Subset(_SINGLE, "f1", 128, "en"),
    "qasper": Subset(_SINGLE, "f1", 128, "en", in_e=True),
    "multifieldqa_en": Subset(_SINGLE, "f1", 64, "en", in_e=True),
    "multifieldqa_zh": Subset(_SINGLE, "f1_zh", 64, "zh"),
    "hotpotqa": Subset(_MULTI, "f1", 32, "en", in_e=True),
    "2wikimqa": Subset(_MULTI, "f1", 32, "en", in_e=True),
    "musique": Subset(_MULTI, "f1", 32, "en"),
    "dureader": Subset(_MULTI, "rouge_l_zh", 128, "zh"),
    "gov_report": Subset(_SUMMARY, "rouge_l", 512, "en", in_e=True, uses_input=False),
    "qmsum": Subset(_SUMMARY, "rouge_l", 512, "en"),
    "multi_news": Subset(_SUMMARY, "rouge_l", 512, "en", in_e=True, uses_input=False),
    "vcsum": Subset(_SUMMARY, "rouge_l_zh", 512, "zh", uses_input=False),
    "trec": Subset(FEW_SHOT, "class", 64, "en", first_line=True, in_e=True),
    "triviaqa": Subset(FEW_SHOT, "f1", 32, "en", first_line=True, in_e=True),
    # the benchmark lets only samsum end at a newline, and asks it for at least one token
    "samsum": Subset(
        FEW_SHOT, "rouge_l", 128, "en", first_line=True, in_e=True, min_new_tokens=1, stop_at_newline=True
    ),
    "lsht": Subset(FEW_SHOT, "class", 64, "zh", first_line=True),
    "passage_count": Subset(_SYNTHETIC, "count", 32, "en", in_e=True, uses_input=False),
    "passage_retrieval_en": Subset(_SYNTHETIC, "retrieval", 32, "en", in_e=True),
    "passage_retrieval_zh": Subset(_SYNTHETIC, "retrieval", 32, "zh"),
    "lcc": Subset(CODE, "edit_sim", 64, "code", in_e=True, uses_input=False),
    "repobench-p": Subset(CODE, "edit_sim", 64, "code", in_e=True),
}
LONGBENCH_E: dict[str, Subset] = {f"{name}_e": subset for name, subset in LONGBENCH.items() if subset.in_e}


def problem(row: dict[str, Any], subset: Subset, needs_length: bool = False) -> str | None:
    """Why a row cannot be run or scored, naming its field; None if it can."""
    answers, classes = row.get("answers"), row.get("all_classes")
    if not isinstance(row.get("context"), str) or not row["context"].strip():
        return "`context` is empty or missing"
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return "`answers` is empty or missing; it is a list of strings"
    if subset.uses_input and not isinstance(row.get("input"), str):
        return "`input` is missing; it is a string"
    if subset.metric == "class" and not (isinstance(classes, list) and classes):
        return "`all_classes` is empty or missing; it lists the labels"
    if subset.metric == "retrieval" and not all(metrics.PARAGRAPH.search(answer) for answer in answers):
        return "`answers` names no paragraph, such as Paragraph 12"
    if needs_length and type(row.get("length")) is not int:
        return "`length` is missing; it is a number of words"
    return wrong(row, {"input": str | None, "all_classes": list[str] | None})


@dataclass(frozen=True)
class Entry:
    """What a split's own subsets.yaml says of one of them, as in `Subset`. prompt: holds {context} and {input}."""

    category: str
    metric: str
    prompt: str
    max_new_tokens: int
    first_line: bool = False
    plain: bool = False
    default: bool = False


def read_catalog(path: Path) -> dict[str, tuple[Subset, Template]]:
    """The subsets of a split with its own prompts, which hold {context} and {input}.

    Raises UserError that names the file, the subset and what is wrong with it.
    """
    try:
        entries = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML that can be read ({error})") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: a mapping from subset names to their settings is needed")
    catalog = {}
    for name, node in entries.items():
        try:
            entry = Entry(**settings(node, Entry, str(name)))
            template = Template.parse(entry.prompt, "{context}", "{input}")
            if entry.metric not in metrics.METRICS:
                raise ValueError(f"metric {entry.metric}; there are {', '.join(metrics.METRICS)}")
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}: {name}: {error}") from error
        said = {key: value for key, value in vars(entry).items() if key != "prompt"}
        catalog[str(name)] = (Subset(**said, uses_input="{input}" in entry.prompt), template)
    return catalog
