"""RULER's question answering: a question's own documents among others, from SQuAD v2 or HotpotQA files."""

import random
from dataclasses import dataclass
from pathlib import Path

from methods.core.errors import UserError
from methods.core.reading import read_json
from tasks.ruler.fitting import Sample
from tasks.ruler.templates import wording

SHUFFLE = 42


@dataclass(frozen=True)
class Question:
    """gold: indices of its own documents.  near: those preferred beside them."""

    query: str
    outputs: list[str]
    gold: list[int]
    near: list[int]


@dataclass(frozen=True)
class Collection:
    """A question set's documents, and its questions by their indices."""

    documents: list[str]
    questions: list[Question]


def read_squad(path: Path) -> Collection:
    """SQuAD v2's dev file; questions without an answer are left out. Raises UserError if it is not such a file."""
    data = read_json(path)
    try:
        articles = [article["paragraphs"] for article in data["data"]]
        documents = sorted({paragraph["context"] for paragraphs in articles for paragraph in paragraphs})
        number = {text: i for i, text in enumerate(documents)}
        questions = []
        for paragraphs in articles:
            contexts = [number[paragraph["context"]] for paragraph in paragraphs]
            for paragraph, gold in zip(paragraphs, contexts):
                near = [other for other in contexts if other != gold]
                questions += [
                    Question(asked["question"], [answer["text"] for answer in asked["answers"]], [gold], near)
                    for asked in paragraph["qas"]
                    if not asked.get("is_impossible", False)
                ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a SQuAD v2 file (no {error})") from error
    return _collection(path, documents, questions)


def read_hotpot(path: Path) -> Collection:
    """HotpotQA's dev file with distractors. Raises UserError if it is not such a file."""
    data = read_json(path, list)
    try:
        texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
        documents = sorted({text for document_texts in texts for text in document_texts})
        number = {text: i for i, text in enumerate(documents)}
        questions = [
            Question(entry["question"], [entry["answer"]], [number[text] for text in document_texts], [])
            for entry, document_texts in zip(data, texts)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a HotpotQA file with distractors ({error})") from error
    return _collection(path, documents, questions)


def _collection(path: Path, documents: list[str], questions: list[Question]) -> Collection:
    if not any(question.outputs for question in questions):
        raise UserError(f"{path}: holds no question with an answer")
    return Collection(documents, questions)


def make(rng: random.Random, question: Question, documents: list[str], units: int) -> Sample:
    """A question with `units` documents, or all there are; its own are always among them."""
    if units >= len(documents):
        chosen = list(range(len(documents)))
    else:
        missing = max(0, units - len(question.gold))
        if missing > len(question.near):
            known = {*question.gold, *question.near}
            others = [i for i in range(len(documents)) if i not in known]
            chosen = [*question.gold, *question.near, *rng.sample(others, missing - len(question.near))]
        else:
            chosen = [*question.gold, *rng.sample(question.near, missing)]
    texts = [documents[i] for i in chosen]
    random.Random(SHUFFLE).shuffle(texts)
    words = wording("qa")
    text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(texts, start=1))
    before, after = words.template.split("{context}")
    return Sample(before + text + "\n\n", after.removeprefix("\n\n").format(query=question.query), words.prefix,
                  question.outputs)  # fmt: skip
