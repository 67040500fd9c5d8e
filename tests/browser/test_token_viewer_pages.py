"""The token viewer in a real browser: hostile and long text, writing systems, paper, dark and narrow pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.test_token_viewer import chosen, easy, run_samples, sums, teachers, token, view
from browser.waiting import until
from opd.reporting import write_report
from reporting.report_inputs import a_sample
from reporting.token_details import detailed, write_samples

Opened = Callable[..., Any]
__all__ = ["view"]
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\u202eabc",
    "\x1b[31m",
    "${alert(3)}",
    "<!--",
)


def test_hostile_text_stays_text(view: Opened):
    words = "".join(HOSTILE)
    sample = detailed(HOSTILE, wanted=HOSTILE[::-1], prompt=words, answer=words, teacher=words, prompt_index=0)
    page = view(sample, easy(teacher="other"))
    for number in range(1, len(HOSTILE) + 1):
        token(page, number).click()
        token(page, number).hover()
    text = page.locator("#viewer-text").inner_text()
    assert HOSTILE[0] in text and "<img·src=x·onerror=alert(2)>" in text
    assert "⟨U+202E⟩abc" in text and "⟨U+001B⟩[31m" in text
    assert "⟨U+202E⟩abc" in page.locator("#viewer-prompt").inner_text()
    assert page.locator("#viewer img, #viewer-app script").count() == 0
    assert "\u202e" not in page.content() and "\x1b" not in page.content()


def test_tokens_stand_in_the_order_sampled_in_every_script(view: Opened):
    tokens = ("مرحبا", " {{ 7*7 }}", " שלום", " 12", " עולם", " ok", "العالم", "!")
    page = view(detailed(tokens))
    boxes = page.locator("#viewer-text .ink").evaluate_all("all => all.map((e) => e.getClientRects()[0].left)")
    assert boxes == sorted(boxes) and len(set(boxes)) == len(tokens)


def test_a_combining_character_stays_inside_its_own_token(view: Opened):
    page = view(detailed(("e", "\u0301x", "é")))
    assert page.locator("#viewer-text .tok").all_inner_texts() == ["e", "◌\u0301x", "é"]
    first, second = (token(page, number).bounding_box() for number in (1, 2))
    assert second["x"] >= first["x"] + first["width"] - 1


def test_a_character_of_several_tokens_is_drawn_once_and_its_parts_say_so(view: Opened):
    pieces = ("ok", "\\xf0\\x9f", "\\x99\\x82", "!")
    page = view(detailed(pieces, kl=(0, 2.0, 1.0, 0), joined=((1, 3, "🙂"),)))
    assert page.locator("#viewer-text .tok").all_inner_texts() == ["ok", "🙂", "◂", "!"]
    token(page, 3).click()
    assert (chosen(page) or "").startswith("token 3, part 2 of 2 of 🙂, reverse KL 1 nats")
    assert page.locator("#viewer-by-token th").first.inner_text() == "part 1 of 2 of 🙂"


def test_special_tokens_of_the_prompt_are_chips(view: Opened):
    page = view(detailed((" 2",), prompt="<|user|>1 + 1<|end|>", special=((0, 8), (13, 20))))
    assert page.locator(".viewer-special").all_inner_texts() == ["<|user|>", "<|end|>"]


def test_ten_thousand_tokens_open_at_once_and_every_one_can_be_reached(tmp_path: Path, open_page: Opened):
    tokens = tuple(f" w{i % 700}" if i % 37 else ".\n" for i in range(10_000))
    kl = tuple(3.0 if i == 7123 else (i % 11) / 1000 for i in range(10_000))
    path = write_report(write_samples(tmp_path / "run", detailed(tokens, kl=kl)))
    page = open_page(path)
    ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
    assert ready < 1500, f"{ready:.0f} ms"
    assert (chosen(page) or "").startswith("token 7124,")
    drawn = page.locator("#viewer-text .tok")
    seen: set[str] = set()
    most = 0
    page.evaluate("document.getElementById('viewer-text').scrollTop = 0")
    for _ in range(2000):
        found = drawn.evaluate_all("all => all.map((e) => e.dataset.i)")
        seen |= set(found)
        most = max(most, len(found))
        at_end = page.evaluate(
            "() => { const b = document.getElementById('viewer-text'); b.scrollTop += b.clientHeight;"
            " const end = b.scrollTop + b.clientHeight >= b.scrollHeight - 2;"
            " return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(end), 0))); }"
        )
        if at_end and "9999" in seen:
            break
    assert seen == {str(i) for i in range(10_000)}
    assert most < 2500
    page.keyboard.press("n")
    assert drawn.count() < 2500


def test_a_link_far_into_a_long_response_shows_its_token_inside_the_box(view: Opened):
    page = view(detailed(tuple(f" w{i}" for i in range(5000))), at="sample-1-token-4321")
    box, word = page.locator("#viewer-text").bounding_box(), token(page, 4321).bounding_box()
    assert box["y"] <= word["y"] and word["y"] + word["height"] <= box["y"] + box["height"]
    page.wait_for_timeout(300)
    assert token(page, 4321).bounding_box()["y"] == pytest.approx(word["y"], abs=box["height"] / 2)


def test_on_paper_the_open_sample_is_whole_and_flat(view: Opened):
    page = view(detailed(tuple(f" w{i}" for i in range(3000))), teachers())
    printed = "() => { dispatchEvent(new Event('beforeprint')); return document.querySelectorAll('.tok').length; }"
    assert page.evaluate(printed) == 3000, "drawn before the browser goes on"
    page.evaluate("() => { dispatchEvent(new Event('afterprint')); }")
    until(page, "document.querySelectorAll('#viewer-text .tok').length < 2500")
    page.emulate_media(media="print")
    until(page, "document.querySelectorAll('#viewer-text .tok').length === 3000")
    box = page.locator("#viewer-text")
    assert box.evaluate("e => e.scrollHeight <= e.clientHeight + 2")
    for hidden in ("#viewer-list", "#viewer-filters", ".viewer-keys"):
        assert not page.locator(hidden).is_visible()
    page.emulate_media(media="screen")
    until(page, "document.querySelectorAll('#viewer-text .tok').length < 2500")


def contrasts(page: Any, selector: str) -> list[float]:
    """Of the text of each element, to the nearest background that is not clear."""
    return page.locator(selector).evaluate_all(
        """all => all.filter((e) => e.textContent.trim() && e.offsetParent).map((e) => {
          const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
          const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          let at = e, back = null;
          while (at && !back) {
            const c = rgb(getComputedStyle(at).backgroundColor);
            if (c.length === 3 || c[3] > 0.5) back = c;
            at = at.parentElement;
          }
          const [low, high] = [light(rgb(getComputedStyle(e).color)), light(back)].sort((a, b) => a - b);
          return (high + 0.05) / (low + 0.05);
        })"""
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("scale", ["kl", "difference", "entropy", "relative"])
def test_text_is_legible_in_both_themes(view: Opened, theme: str, scale: str):
    tokens = tuple("abcdefg")
    page = view(
        detailed(tokens, kl=(0, 0.02, 0.05, 0.2, 0.5, 2, 9)), *run_samples(), at="sample-1-token-7", color_scheme=theme
    )
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.select_option("#viewer-scale", scale)
    page.mouse.move(0, 0)
    words = "#viewer-app :is(.ink, .viewer-chip, .note, h3, h4, td, th, button:enabled, label, bdi, .viewer-share, kbd, output)"
    found = contrasts(page, words)
    assert len(found) > 100 and min(found) >= 4.5


def test_a_phone_scrolls_in_one_direction_and_gets_a_sheet(view: Opened):
    page = view(*run_samples(), viewport={"width": 420, "height": 860})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert not page.locator("#viewer-panel").is_visible(), "nothing covers the text at first"
    assert not page.locator("#viewer-list").is_visible()
    page.locator("#viewer-toggle").click()
    page.locator("#viewer-list [data-n]").nth(1).click()
    assert not page.locator("#viewer-list").is_visible()
    token(page, 5).click()
    sheet = page.locator("#viewer-panel").bounding_box()
    assert sheet["y"] + sheet["height"] == pytest.approx(860, abs=1) and sheet["width"] <= 420
    word = token(page, 5).bounding_box()
    assert word["y"] + word["height"] <= sheet["y"], "the token is not under the sheet"
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.keyboard.press("Escape")
    assert not page.locator("#viewer-panel").is_visible()


def test_nothing_moves_when_a_token_or_a_sample_or_a_colour_is_chosen(view: Opened):
    page = view(*run_samples(), a_sample(prompt="long", tokens=("word ",) * 90))
    where = "e => { const { top, height } = e.getBoundingClientRect(); return [Math.round(top + scrollY), height]; }"
    place = page.locator("#viewer-panel").evaluate(where)
    for act in (
        lambda: page.keyboard.press("Escape"),
        lambda: page.keyboard.press("n"),
        lambda: page.locator("#viewer-list [data-n]").last.click(),
        lambda: page.select_option("#viewer-scale", "difference"),
        lambda: page.select_option("#viewer-scale", "relative"),
    ):
        act()
        assert page.locator("#viewer-panel").evaluate(where) == place


def test_a_person_who_wants_no_motion_sees_none(view: Opened):
    page = view(sums(), reduced_motion="reduce")
    assert page.locator(".viewer-fill.teacher").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


def test_a_page_that_left_samples_out_says_so(tmp_path: Path, open_page: Opened):
    samples = [detailed(tuple(f" w{i}" for i in range(1500)), step=step, prompt_index=0) for step in range(20)]
    path = write_report(write_samples(tmp_path / "run", *samples))
    start = time.perf_counter()
    page = open_page(path)
    assert time.perf_counter() - start < 10
    assert "of 20 recorded responses" in page.locator(".viewer-left-out").inner_text()
