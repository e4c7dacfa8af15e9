"""The page: what it holds, and that a real browser can use it."""

import base64
import gzip
import json
import re
import shutil

import pytest

from analysis import report
from analysis.load import load_results
from analysis.points import points
from tests.analysis.conftest import Book

SUBSETS = [("qa", "QA")] * 6 + [("sum", "summaries")] * 6
NASTY = '<script>document.title = "broken in"</script><img src=x onerror="document.title=1"></script> & "quotes"'


COMMAND = "python run.py method=nacl"


def fill(book):
    notes = {"command": COMMAND}
    book.cell(scores=[1.0] * 12, subsets=SUBSETS, predictions=["right"] * 12, notes=notes)
    book.cell("nacl", [0.0] + [1.0] * 11, 0.5, subsets=SUBSETS, predictions=[NASTY] * 12, notes=notes)
    book.cell("nacl", [0.0] * 6 + [1.0] * 6, 0.25, subsets=SUBSETS)
    book.cell("kivi", [1.0] * 12, 0.3, subsets=SUBSETS)
    book.cell("fake", [1.0] * 12, 0.1, subsets=SUBSETS, notes={"simulated": True})
    places = [{"tags": {"length": n, "depth": d}} for n in (256, 512) for d in (0, 50)]
    book.cell(scores=[0.5] * 4, task="other-mini", rows=places)
    book.cell("kivi", [0.5] * 4, 0.3, task="other-mini", rows=places)
    book.cell(scores=[0.0] * 4, task="hard-mini", protocol="agnostic")
    book.cell("kivi", [0.0] * 4, 0.3, task="hard-mini", protocol="agnostic")


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The page of the records that `fill` makes, which these tests only read."""
    book = Book(tmp_path_factory.mktemp("records"))
    fill(book)
    assert report.main([str(book.root)]) == 0
    return book.root / "report.html"


def test_the_page_is_one_file_without_a_network(html):
    text = html.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", text)
    assert len(text) < 5 * 2**20


def contents(html):
    """What the page's script finds."""
    data = re.search(r'id="data">(.*?)</script>', html.read_text(), re.S).group(1)
    return json.loads(gzip.decompress(base64.b64decode(data)))


def test_model_output_stands_in_the_page_as_data_only(html):
    assert "broken in" not in html.read_text()
    data = contents(html)
    (own,) = [f for cell, f in data["flips"].items() if "nacl-b0.5" in cell]
    ((name, score, ours, category),) = own["samples"]
    assert (name, score, ours, category) == ("qa/0", 0.0, NASTY, "QA") and own["flipped"] == {"QA": 1}
    shared = data["samples"][own["of"]]["qa/0"]
    assert (shared["full"], shared["answers"], shared["prompt"], shared["score"]) == ("right", ["me"], "Who?", 1.0)


def test_everything_behind_a_number_is_named(html):
    data = contents(html)
    at = list(zip(data["points"]["label"], data["points"]["budget"])).index(("nacl", 0.5))
    (cell,), (full,) = data["points"]["cells"][at], data["points"]["full_cells"][at]
    assert "nacl" in cell and "full" in full
    for name in (cell, full):
        told = data["cells"][name]
        assert told["command"] == COMMAND and told["commit"] == "abc" and told["weights"] == "sha256:0"
        assert json.loads(told["fingerprint"]) == {} and "torch" in told["conditions"][0]
        assert told["ledger"]["full_prompt"] == 1000 and sum(told["layers"]) == told["ledger"]["held_prompt"]


def test_seeds_that_were_pooled_are_all_named_and_their_flips_shown(book):
    book.cell(scores=[1.0, 1.0])
    for seed, scores in ((0, [0.0, 1.0]), (1, [0.0, 0.0])):
        book.cell("random", scores, 0.5, seed=seed)
    data = report.contents(*(lambda r: (r, points(r).assign(front=False)))(load_results(book.root)))
    at = data["points"]["label"].index("random")
    assert len(data["points"]["cells"][at]) == 2 == data["points"]["seeds"][at]
    assert sorted(len(data["flips"][cell]["samples"]) for cell in data["points"]["cells"][at]) == [1, 2]


def test_speeds_are_those_of_cells_that_ran_alone(book):
    book.cell(scores=[1.0, 1.0], rows=[{"group": 2}, {}])
    book.cell("nacl", [1.0, 1.0], 0.5, rows=[{"group": 2}] * 2)
    results = load_results(book.root)
    data = report.contents(results, points(results).assign(front=False))
    speeds = {
        name.split("/")[-1].split("-")[0]: (c["prompt"], c["decode"], c["timed"]) for name, c in data["cells"].items()
    }
    assert speeds == {"full": (200.0, 10.0, 1), "nacl": (None, None, 0)}


def test_an_area_of_single_samples_has_no_interval_in_the_page(book):
    book.cell(scores=[1.0])
    book.cell("nacl", [1.0], 0.5)
    assert report.main([str(book.root)]) == 0
    (area,) = contents(book.root / "report.html")["areas"]
    assert (area["area"], area["area_low"], area["area_high"], area["from"]) == (100.0, None, None, 0.5)


def test_many_flips_share_a_bounded_room(book, monkeypatch):
    fill(book)
    monkeypatch.setattr(report, "TEXT_BYTES", 400)
    results = load_results(book.root)
    data = report.contents(results, points(results).assign(front=False))
    shown = [ours for own in data["flips"].values() for _, _, ours, _ in own["samples"]]
    texts = [
        t for own in data["samples"].values() for s in own.values() for t in (s["prompt"], s["full"], *s["answers"])
    ]
    assert len(shown) == 7 and NASTY[:10] in "".join(shown)
    assert sum(map(len, shown + texts)) <= 400 + 4 * len(shown + texts)  # an ellipsis each


def test_flips_are_of_every_subset_and_maps_of_every_category(book, monkeypatch):
    monkeypatch.setattr(report, "FLIPS", 4)
    subsets = [("a", "x")] * 6 + [("b", "x")] * 6 + [("c", "y")] * 6
    places = [{"tags": {"length": 256, "depth": 0 if name == "c" else 50}} for name, _ in subsets]
    book.cell(scores=[1.0] * 18, subsets=subsets, rows=places)
    book.cell("nacl", [0.0] * 18, 0.5, subsets=subsets, rows=places)
    results = load_results(book.root)
    data = report.contents(results, points(results).assign(front=False))
    (own,) = data["flips"].values()
    assert [name.split("/")[0] for name, *_ in own["samples"]] == ["a", "b", "c", "a", "b", "c", "c", "c"]
    assert own["flipped"] == {"x": 12, "y": 6}
    (cell,) = (cell for name, cell in data["cells"].items() if "nacl" in name)
    assert cell["maps"]["x"]["depths"] == [50.0] and cell["maps"]["y"]["depths"] == [0.0]
    assert cell["maps"]["all"]["depths"] == [0.0, 50.0]


def test_nothing_to_report_is_said(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "run.py" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser_page(html, browser):
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(html.as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
    yield page
    page.close()


def test_a_browser_filters_sorts_hovers_and_opens_a_flipped_sample(browser_page):
    page = browser_page
    page.select_option("#task", "quiz-mini")

    def first_column():
        return page.locator("#table tbody tr td:first-child").all_inner_texts()

    assert set(first_column()) == {"full", "nacl", "kivi", "fake (simulated)"}
    page.click("#table th button[data-key=score]")
    assert first_column()[0] == "nacl"
    page.click("#table th button[data-key=score]")
    assert first_column()[-1] == "nacl" and page.locator("th[aria-sort=descending]").inner_text() == "score"

    page.uncheck("#families input[value=quantization]")
    assert "kivi" not in first_column() and "full" in first_column()
    page.check("#families input[value=quantization]")

    # by keyboard: arrows move between the rows, Enter chooses one
    page.locator("#table tbody tr", has_text="nacl").filter(has_text="91.7").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert "nacl-b0.5" in page.inner_text("#cell") and COMMAND in page.inner_text("#cell")
    assert "held, end of the prompt" in page.inner_text("#ledger")
    assert page.locator("#layers .barlayer .point").count() == 2
    page.locator("#flips summary").first.click()
    assert page.locator("#flips pre").last.inner_text() == NASTY  # text, not markup
    assert page.title() == "kvfrontier report"

    point = page.locator("#frontier .scatterlayer .point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#frontier .hoverlayer .hovertext")
    hovered = page.locator("#frontier .hoverlayer").text_content()
    assert "at budget" in hovered and "n = 12" in hovered and "of the bytes" in hovered and "aware" in hovered
    assert page.errors == []


def test_a_browser_shows_heat_maps_speeds_categories_and_what_is_near_chance(browser_page):
    page = browser_page
    page.select_option("#task", "other-mini")
    page.wait_for_selector("#map .hm image, #map .heatmaplayer image")
    assert page.is_visible("#fullmap") and "200" in page.inner_text("#speed")
    page.select_option("#task", "quiz-mini")
    assert not page.is_visible("#map")
    page.select_option("#category", "summaries")
    assert "No sample of this cell flipped" in page.inner_text("#flips")  # those that did are questions
    assert page.locator("#table tbody tr", has_text="nacl").first.inner_text().split("\t")[3] == "6"
    page.select_option("#task", "hard-mini")
    assert page.input_value("#protocol") == "agnostic" and page.locator("#table tbody tr").count() == 0
    assert "Near chance with the full cache, not compared: hard-mini (agnostic)" in page.inner_text("#apart")
    assert page.errors == []


def test_nothing_is_wider_than_a_phone(browser_page):
    page = browser_page
    page.evaluate("document.querySelector('#task option').textContent = 'a-very-long-name-of-a-task-'.repeat(4)")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_dark_page_draws_light_text(browser_page):
    page = browser_page
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert "230, 230, 230" in page.evaluate("getComputedStyle(document.querySelector('#frontier .xtick text')).fill")
