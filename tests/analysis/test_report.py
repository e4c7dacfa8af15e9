"""The page: what it holds, and that a real browser can use it."""

import json
import re
import shutil

import pytest

from analysis import report
from analysis.load import load

SUBSETS = [("qa", "QA")] * 6 + [("sum", "summaries")] * 6
NASTY = '<script>document.title = "broken in"</script><img src=x onerror="document.title=1"></script> & "quotes"'


def fill(book):
    book.cell(scores=[1.0] * 12, subsets=SUBSETS, predictions=["right"] * 12)
    book.cell("nacl", [0.0] + [1.0] * 11, 0.5, subsets=SUBSETS, predictions=[NASTY] * 12)
    book.cell("nacl", [0.0] * 6 + [1.0] * 6, 0.25, subsets=SUBSETS)
    book.cell("kivi", [1.0] * 12, 0.3, subsets=SUBSETS)
    book.cell("fake", [1.0] * 12, 0.1, subsets=SUBSETS, notes={"simulated": True})
    book.cell(scores=[0.5] * 4, task="other-mini")
    book.cell("kivi", [0.5] * 4, 0.3, task="other-mini")


@pytest.fixture
def html(book):
    fill(book)
    assert report.main([str(book.root)]) == 0
    return book.root / "report.html"


def test_the_page_is_one_file_without_a_network(html):
    text = html.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", text)
    assert len(text) < 5 * 2**20


def test_model_output_stands_in_the_page_as_data_only(html):
    text = html.read_text()
    assert "document.title = " not in text.replace("\\u003cscript\\u003edocument.title = ", "")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))
    (flips,) = [f for cell, f in data["flips"].items() if "nacl-b0.5" in cell]
    assert [f["ours"] for f in flips] == [NASTY] and flips[0]["full"] == "right" and flips[0]["answers"] == ["me"]


def test_many_flips_share_a_bounded_room(book, monkeypatch):
    fill(book)
    monkeypatch.setattr(report, "TEXT_BYTES", 400)
    results = load(book.root)
    made = report.page(results)
    assert NASTY[:20] not in made and "\\u003cscri" in made


def test_nothing_to_report_is_said(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "run.py" in capsys.readouterr().err


@pytest.fixture
def browser_page(html):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(html.as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        yield page
        browser.close()


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

    page.locator("#table tbody tr", has_text="nacl").filter(has_text="91.7").focus()
    page.keyboard.press("Enter")
    assert "nacl-b0.5" in page.inner_text("#cell")
    page.locator("#flips summary").first.click()
    assert page.locator("#flips pre").last.inner_text() == NASTY  # text, not markup
    assert page.title() == "kvfrontier report"

    point = page.locator("#frontier .scatterlayer .point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#frontier .hoverlayer .hovertext")
    assert "at budget" in page.locator("#frontier .hoverlayer").text_content()
    assert page.errors == []


def test_a_dark_page_draws_light_text(browser_page):
    page = browser_page
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert "230, 230, 230" in page.evaluate("getComputedStyle(document.querySelector('#frontier .xtick text')).fill")
