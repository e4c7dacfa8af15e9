"""What must not be mixed gets names of its own."""

from analysis.load import load_results
from analysis.names import bits
from analysis.points import points


def test_one_model_with_two_sets_of_weights_is_two_models(book):
    for weights, score in (("sha256:" + "a" * 16, 1.0), ("sha256:" + "b" * 16, 0.0)):
        book.cell(scores=[1.0] * 4, weights=weights)
        book.cell("nacl", [score] * 4, 0.5, weights=weights)
    table = points(load_results(book.root)).set_index(["model", "label"])["score"]
    assert table[f"tiny (weights={'a' * 16})", "nacl"] == 100 and table[f"tiny (weights={'b' * 16})", "nacl"] == 0


def test_one_task_with_other_data_is_another_task(book):
    for digest, score in (("1" * 64, 1.0), ("2" * 64, 0.0)):
        own = {"data_sha256": digest, "version": 3}
        book.cell(scores=[1.0] * 4, fingerprint=own)
        book.cell("nacl", [score] * 4, 0.5, fingerprint=own)
    table = points(load_results(book.root)).set_index(["task", "label"])["score"]
    assert table["quiz-mini (data_sha256=11111111)", "nacl"] == 100
    assert table["quiz-mini (data_sha256=22222222)", "nacl"] == 0


def test_a_cap_that_follows_the_budget_is_one_task_whose_cells_have_full_caches_of_their_own(book):
    for cap, full in ((64, 1.0), (128, 0.5)):
        book.cell(scores=[full] * 4, fingerprint={"cap": cap})
        book.cell("nacl", [0.5] * 4, float(cap), fingerprint={"cap": cap})
    table = points(load_results(book.root))
    assert set(table["task"]) == {"quiz-mini"}
    assert table[table["label"] == "nacl"].set_index("budget")["full"].to_dict() == {64.0: 100.0, 128.0: 50.0}


def test_names_are_left_alone_where_nothing_differs(book):
    book.cell(scores=[1.0], fingerprint={"data_sha256": "1" * 64})
    book.cell(scores=[1.0], task="other-mini", fingerprint={"data_sha256": "2" * 64})
    found = load_results(book.root).cells
    assert set(found["model"]) == {"tiny"} and set(found["task"]) == {"quiz-mini", "other-mini"}


def test_bits_are_read_from_the_configuration():
    assert bits('{"key_bits": 4, "value_bits": 2}') == "K4V2" and bits('{"key_bits": 4, "value_bits": 4}') == "4 bits"
    assert bits('{"table": "C2.25"}') == "C2.25" and bits('{"table": "C2.50"}') == "C2.50"
    assert bits('{"table": "assets/x/mixed-3.yaml"}') == "mixed-3" and bits('{"budget": 0.5}') == ""


def test_shares_of_two_types_of_numbers_are_never_on_one_curve_and_a_line_says_so(book):
    for held in (None, "float16"):
        book.cell(cache_dtype=held)
        book.cell("snapkv", budget=0.5, cache_dtype=held)
    found = load_results(book.root)
    assert sorted(found.cells["model"].unique()) == ["tiny (cache_dtype=auto)", "tiny (cache_dtype=float16)"]
    assert [line for line in found.problems if "caches of auto and float16 numbers" in line]
    for _, panel in points(found).groupby("model"):
        assert list(panel["method"]) == ["full", "snapkv"]
