from tasks.base import as_parts
from tasks.reasoning import Reasoning, end_of


def test_the_end_counts_flexibly_and_every_step_strictly():
    task = Reasoning()
    (example, *_) = task.examples()
    steps = example.answers[0]
    assert task.parts(example, steps) == {"strict": 1, "flexible": 1}
    assert task.parts(example, f"{steps.strip()}\n") == {"strict": 1, "flexible": 1}
    assert task.parts(example, f" by another way {end_of(steps)}.") == {"strict": 0, "flexible": 1}
    assert task.parts(example, steps.replace(end_of(steps), "nothing")) == {"strict": 0, "flexible": 0}
    assert task.parts(example, "") == {"strict": 0, "flexible": 0}


def test_readings_are_averaged_apart():
    task = Reasoning(limit=1)
    rows = [row for e in task.examples() for row in as_parts(e, {"parts": {"strict": 0.0, "flexible": 1.0}})]
    found = {row.name: row.score for row in task.summarize(rows)}
    assert found["mean, strict"] == 0 and found["mean, flexible"] == 100 and found["bridge strict"] == 0


def test_every_bundled_answer_follows_from_its_context():
    for example in Reasoning(subset=["chains_3", "chains_4", "chains_5"]).examples():
        first = example.question.split()[-1]
        words = [first, *example.answers[0].split()]
        for a, verb, b in zip(words[0::2], words[1::2], words[2::2]):
            assert f"{a} {verb} {b.rstrip('.')}." in example.context
        assert verb == "holds"
