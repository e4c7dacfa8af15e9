"""Which cells of a grid become one job, and how they travel."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runners.jobs import group, job_cells, spread, tidy


def test_cells_that_differ_in_the_method_only_are_one_job():
    grid = [
        ["method=full", "budget=0.5", "task=longbench"],
        ["method=nacl", "budget=0.5", "task=longbench"],
        ["method=nacl", "budget=0.5", "task=needle"],
        ["method=nacl", "budget=0.25", "task=longbench"],
    ]
    jobs = group(grid)
    assert [job[0] for job in jobs] == ["task=longbench", "task=needle"]
    assert [sorted(cell) for cell in job_cells(jobs[0])] == [sorted(grid[i]) for i in (0, 1, 3)]


def test_knobs_are_spread_where_the_method_is():
    swept = ["-m", "method=kivi,per_token", "method.bits=4", "method.x=1,2", "+method.y=[1,2]", "budget=1"]
    assert spread(swept) == [*swept[:2], "method.bits=4,4", *swept[3:]]
    assert spread(["experiment=core", "method.a=b c"]) == ["experiment=core", "method.a=b c,b c"]
    alone = ["-m", "method=kivi", "method.bits=4", "budget=0.5,1"]
    assert spread(alone) == alone and spread(["--help"]) == ["--help"]


@pytest.mark.parametrize(
    "value", ["null", "'null'", "", "''", "[1,null]", "{a: null}", "${seed}", "1e-3", "true", "b c"]
)
def test_a_spread_value_is_what_was_typed_once(value):
    parse = OverridesParser.create().parse_override
    _, word = spread(["method=kivi,nacl", f"method.knob={value}"])
    (only,) = set(parse(word).sweep_string_iterator())  # of equal cells the sweeper makes one
    typed = parse(f"method.knob={value}").value()
    assert parse(f"method.knob={only}").value() == typed and type(typed) is type(parse(f"method.knob={only}").value())


def test_budgets_that_the_task_takes_too_are_jobs_of_their_own():
    grid = [[f"method={m}", f"budget={b}", "task=t"] for b in (8, 16) for m in ("full", "h2o")]
    jobs = group(grid, lambda cell: "task=t" in cell)
    assert [job[:-1] for job in jobs] == [["task=t", "budget=8"], ["task=t", "budget=16"]]
    assert [sorted(cell) for job in jobs for cell in job_cells(job)] == [sorted(cell) for cell in grid]


@pytest.mark.parametrize("own", ["method.window=3", "+method.x=1", "~method.kernel", "seed=2"])
def test_knobs_and_seeds_share_a_prompt(own):
    jobs = group([["task=longbench", "method=snapkv"], ["task=longbench", "method=snapkv", own]])
    assert len(jobs) == 1 and len(job_cells(jobs[0])) == 2


@pytest.mark.parametrize("other", ["task.limit=3", "model=qwen3-8b", "protocol=agnostic", "chunk=64", "dtype=float16"])
def test_what_changes_the_prompt_pass_does_not(other):
    assert len(group([["method=snapkv"], ["method=snapkv", other]])) == 2


def test_the_same_cell_twice_is_one():
    assert len(job_cells(group([["method=full"], ["method=full"]])[0])) == 1


@pytest.mark.parametrize("value", ["a b", "it's", "[1,2]", "{x: 1, y: 'b c'}", "50%", "a,b", "%20", '"quoted"'])
def test_any_value_comes_back_as_it_was_typed(value):
    grid = [["task=longbench", f"method.name={value}"], ["task=longbench", "method=full"]]
    (job,) = group(grid)
    assert job_cells(job) == grid


def test_a_job_that_is_no_group_has_no_cells():
    assert job_cells(["runner=train", "seed=1"]) == [] and job_cells([]) == []


def test_ranges_give_numbers_as_one_would_type_them():
    assert tidy(["budget=0.30000000000000004", "method=nacl", "task.data=v1.0", "budget=0.25", "seed=3"]) == [
        "budget=0.3", "method=nacl", "task.data=v1.0", "budget=0.25", "seed=3",
    ]  # fmt: skip
