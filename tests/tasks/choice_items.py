"""A few items of our own in the form of the published multiple-choice sets."""

import json
from pathlib import Path
from typing import Any

PIQA = [
    {"goal": "dry a wet mat", "sol1": "lay it on a cat", "sol2": "hang it over a rail in the sun", "label": 1},
    {"goal": "read in the dark", "sol1": "switch on a lamp", "sol2": "close both eyes tightly", "label": 0},
    {"goal": "cross a long river", "sol1": "take the bridge", "sol2": "wait for an answer", "label": 0},
]
COPA = [
    {"question": "cause", "premise": "The cat sat down.", "choice1": "It slept.", "choice2": "It rained.", "label": 0},
    {"question": "effect", "premise": "The mat was wet.", "choice1": "I sang.", "choice2": "The cat left.", "label": 1},
]
OPENBOOKQA = [
    {
        "question_stem": "A river flows to the",
        "choices": {"text": ["north pole", "sea", "cat", "mat"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "question_stem": "Cats see at night because of their",
        "choices": {"text": ["tails", "paws", "eyes", "mats"], "label": ["A", "B", "C", "D"]},
        "answerKey": " C",
    },
]
WINOGRANDE = [
    {"sentence": "The cat left the mat because the _ was wet.", "option1": "cat", "option2": "mat", "answer": "2"},
    {"sentence": "The cat fits the box since the _ is small.", "option1": "cat", "option2": "box", "answer": "1"},
]
SCIQ = [
    {
        "support": " Rain falls from clouds.",
        "question": "What does rain fall from?",
        "distractor1": "rivers",
        "distractor2": "trees",
        "distractor3": "mats",
        "correct_answer": "clouds",
    },
    {
        "support": "",
        "question": "What do cats drink?",
        "distractor1": "sand",
        "distractor2": "ink",
        "distractor3": "air",
        "correct_answer": "water",
    },
]
ARC = [
    {
        "question": "Which of these is wet?",
        "choices": {"text": ["sand", "fire", "a river"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    },
    {
        "question": "Which of these can read?",
        "choices": {"text": ["a pupil", "a mat", "a cat", "rain"], "label": ["1", "2", "3", "4"]},
        "answerKey": "1",
    },
]
ROWS = {
    "piqa": ("validation", PIQA),
    "copa": ("validation", COPA),
    "openbookqa": ("test", OPENBOOKQA),
    "winogrande": ("validation", WINOGRANDE),
    "sciq": ("test", SCIQ),
    "arc_easy": ("test", ARC),
    "arc_challenge": ("test", ARC[::-1]),
}


TEXTS = {"piqa": "goal", "copa": "premise", "openbookqa": "question_stem", "winogrande": "sentence"}
TEXTS |= dict.fromkeys(["sciq", "arc_easy", "arc_challenge"], "question")


def write(folder: Path) -> str:
    """All of them below a folder, and training rows that are not among them; the folder as typed."""
    for task, (split, rows) in ROWS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        put(folder / task / f"{split}.jsonl", rows)
        solved = [{**row, TEXTS[task]: f"{when}: {row[TEXTS[task]]}"} for when in ("Long ago", "Now") for row in rows]
        put(folder / task / "train.jsonl", solved)
    return str(folder)


def put(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
