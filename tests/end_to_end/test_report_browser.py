"""A dataset's page in a real browser: it loads nothing, runs nothing of the data's, fits, and finds what it is asked.

Chromium is driven by Playwright; where either is missing these tests are skipped and say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_data.format.dataset import Dataset
from lwm_data.format.example import text_runs, vision_runs
from lwm_data.format.vocab import TextTokenizer
from lwm_data.report.page import write_dataset_page
from lwm_data.sources.record import Record
from tests.tiny_vision import TINY, with_tokenizer, write_tiny_tokenizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><svg onload=hacked=1>"
FOUND = "[...CSS.highlights.get('found')].map(range => range.toString())"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'lwm[dev]'")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(
    dataset_of: Callable[..., Dataset], demo_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page of hostile words and names, long words, a question with its answer, and a picture."""
    folder = tmp_path_factory.mktemp("page")

    def text(key: str, *parts: tuple[str, bool]) -> Record:
        ids = [(demo_tokenizer.encode(part), trained) for part, trained in parts]
        return Record(key, text_runs(demo_tokenizer, ids, eos=True))

    codes = np.random.default_rng(0).integers(0, TINY.num_codes, (1, 256), dtype=np.int32)
    words = text_runs(demo_tokenizer, [(demo_tokenizer.encode("A cat."), False)], eos=False)
    records = [
        text(HOSTILE, (HOSTILE, True)),
        text("x" * 300, ("y" * 900, True)),
        text("talk", ("Who hid the", False), ("gold? Ben Gunn hid the Gold.", True)),
        text("long", ("A word. " * 400, False), ("The end.", True)),
        Record("photo", (*words, *vision_runs(demo_tokenizer, codes, trained=True))),
    ]
    made = dataset_of(folder, records, row_length=2100)
    dataset = with_tokenizer(made, write_tiny_tokenizer(folder / "tiny.yaml"))
    hostile = dataset.info.model_copy(update={"name": HOSTILE, "rejected": {HOSTILE: 3}, "manifest": {"a": HOSTILE}})
    write_dataset_page(folder / "page.html", Dataset(dataset.url, hostile), 8, 0)
    return folder / "page.html"


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Callable[..., Any]]:
    """opened(width, scheme) is the page in a window of its own; nothing may be asked for or go wrong in any."""
    contexts, wrong, asked = [], list[str](), list[str]()

    def open_page(width: int = 1400, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(page_file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_is_light_or_dark(opened: Callable[..., Any], width: int, scheme: str) -> None:
    page = opened(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll("body *")].filter(element =>
        !element.closest(".scroll, svg, .plot, option") && element.getBoundingClientRect().right > innerWidth + 1
    ).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []
    ground, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)")
        for name in ("backgroundColor", "color")
    )
    assert (sum(ground) < 3 * 60 and sum(ink) > 3 * 200) if scheme == "dark" else (sum(ground) > 3 * 230 > sum(ink))


def test_nothing_in_the_data_runs(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.evaluate("window.hacked") is None
    assert page.title() == HOSTILE and page.locator("h1").inner_text() == HOSTILE
    assert page.locator("script").count() == 1 and page.locator("img[src=x], svg[onload]").count() == 0
    assert HOSTILE in page.locator(".segment").filter(has_text="hacked").first.inner_text()


def test_no_script_runs_but_the_page_s_own(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    with page.expect_console_message() as refused:
        page.evaluate("const s = document.createElement('script'); s.text = 'hacked = 2'; document.body.append(s)")
    assert "Content Security Policy" in refused.value.text
    assert page.evaluate("window.hacked") is None
    page.context.close()


def test_the_picture_is_drawn(opened: Callable[..., Any]) -> None:
    page = opened()
    picture = page.locator(".segment img")
    picture.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.segment img').complete")
    assert picture.evaluate("image => [image.naturalHeight, image.alt]") == [128, "[vision 257 tokens: 1 frame]"]


def test_search_finds_marks_and_hides(opened: Callable[..., Any]) -> None:
    page = opened(400)
    box, output = page.get_by_label("Search the text of these rows"), page.locator("#rows output")
    assert output.inner_text() == "5 of 5 segments"
    page.keyboard.press("/")
    assert box.evaluate("input => input === document.activeElement"), "a key leads to the search"
    page.keyboard.type("the GOLD")
    assert page.evaluate(FOUND) == ["the gold", "the Gold"], "whatever the case, and across runs"
    assert output.inner_text() == "2 found in 1 of 5 segments"
    assert page.locator(".segment:visible").count() == 1 and page.locator("#rows .row:visible").count() == 1
    page.keyboard.press("Enter")
    assert page.locator(".segment:visible span").first.evaluate(
        "span => span.getBoundingClientRect().top >= 0 && span.getBoundingClientRect().top < innerHeight"
    )
    box.fill("<img src=x")
    assert page.evaluate(FOUND) == ["<img src=x"] * 2, "in the key and in the text"
    box.fill("nowhere")
    assert page.evaluate(FOUND) == [] and page.locator(".segment:visible").count() == 0
    page.keyboard.press("Escape")
    assert page.locator(".segment:visible").count() == 5 and box.input_value() == ""


def test_a_long_prompt_is_opened_at_its_answer(opened: Callable[..., Any]) -> None:
    page = opened()
    box = page.locator(".segment > .text").filter(has_text="The end.")
    assert box.evaluate("element => element.scrollTop > 0")
    assert page.locator(".segment > .text").filter(has_text="Ben Gunn").evaluate("element => element.scrollTop") == 0
