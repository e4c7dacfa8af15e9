"""Links from records to the logs of the jobs that wrote them."""

import os

from runners.records.job_log import LOG
from runners.records.record import Record


def record(results) -> Record:
    return Record(results, {"model": {"name": "m"}, "task": {"name": "t"}, "method": {"name": "full"}, "budget": 1})


def write(results) -> Record:
    cell = record(results)
    with cell.lock(lambda: None), cell.begin({}) as writer:
        writer.append({"id": "a"})
    return cell


def test_a_record_links_to_the_log_of_its_job_once_and_still_does_when_the_results_are_moved(tmp_path, monkeypatch):
    log = tmp_path / "results" / ".hydra-runs" / "7_0_log.out"
    log.parent.mkdir(parents=True)
    log.write_text("what the job said")
    monkeypatch.setenv(LOG, str(log))
    write(tmp_path / "results")
    write(tmp_path / "results")
    os.rename(tmp_path / "results", tmp_path / "moved")
    (link,) = record(tmp_path / "moved").folder.glob("*_log.out")
    assert link.read_text() == "what the job said"


def test_a_record_made_without_a_job_has_no_link(tmp_path, monkeypatch):
    monkeypatch.delenv(LOG, raising=False)
    assert not [path for path in write(tmp_path / "results").folder.iterdir() if path.is_symlink()]
