"""What a run prints while it works."""

import time

from runners.report import run_table as show


def test_a_line_is_said_before_the_first_sample_has_ended(capsys, monkeypatch):
    monkeypatch.setattr(show, "PLAIN_EVERY", 0.05)
    with show.Bar("nacl", 3):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line == "nacl: 0/3 samples, 0 s" for line in lines)


def test_nothing_is_said_between_samples_that_come_quickly(capsys):
    with show.Bar("nacl", 3) as bar:
        for _ in range(3):
            bar.advance(1)
    assert capsys.readouterr().err.splitlines() == ["nacl: 3/3 samples, 0 s, about 0 s left"]
