"""The page of opd compare in a real browser."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd.reporting import RunRecorder, write_summary
from opd.reporting.compare import compare
from opd.reporting.compare_page import write_page
from opd.reporting.runs import grouped, read_runs
from reporting.compare_inputs import write_compared
from reporting.report_inputs import a_sample

READY_IN = 3.0  # seconds
LARGEST = 2.5e6  # bytes, of eight runs of 3,000 steps
PHONE = {"viewport": {"width": 420, "height": 900}}


def page_of(*runs: Path) -> Path:
    return write_page(compare(grouped(read_runs(runs))), runs[0].parent / "compare.html")


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """A page of two seeds of A and one run of B."""
    runs = [write_compared(tmp_path / f"a-s{s}", seed=s, samples=True, right=(s - 1, 0, 0, 1)) for s in (1, 2)]
    runs.append(write_compared(tmp_path / "b", seed=1, samples=True, right=(1, 1, 1, 1), optimizer__lr=1e-4))
    return page_of(*runs)


def test_it_shows_results_curves_recipes_and_answers(seeds: Path, open_page: Callable[..., Any]):
    page = open_page(seeds)
    assert page.locator("h1").inner_text() == "a and b"
    assert page.locator("#result tbody tr").count() == 2
    assert "optimizer.lr" in page.locator("#recipes").inner_text()
    drawn = page.locator("figure.chart").filter(has_text="Loss")
    assert drawn.locator("svg .curve").count() >= 2 and drawn.locator("svg .band").count() == 0
    assert page.locator("#side-by-side .side").count() == 2


def test_the_curve_of_a_group_has_a_band_from_its_lowest_to_its_highest_seed(
    seeds: Path, open_page: Callable[..., Any]
):
    page = open_page(seeds)
    chart = page.locator("figure.chart").filter(has_text="Held-out accuracy")
    spec = chart.first.locator("script").evaluate("element => JSON.parse(element.textContent)")
    (line,) = [line for line in spec["lines"] if line["label"].startswith("A ")]
    assert (line["y"], line["low"], line["high"]) == ([0, 0.375], [0, 0.25], [0, 0.5])
    assert chart.first.locator("svg .band").count() == 2


def test_a_prompt_is_chosen_by_click_and_by_keys(seeds: Path, open_page: Callable[..., Any]):
    page = open_page(seeds)
    prompts = page.locator("#prompts button")
    assert prompts.count() == 4
    # The runs agree on the last prompt alone, so it is the last of the list; on row 1 and 2 they differ most.
    assert [prompts.nth(i).locator(".words").inner_text() for i in (0, 3)] == ["1 + 1 =", "3 + 1 ="]
    prompts.nth(3).click()
    assert "Prompt, row 3" in page.locator("#prompt").inner_text()
    page.keyboard.press("ArrowUp")
    assert (
        prompts.nth(2).get_attribute("aria-current") == "true" and prompts.nth(3).get_attribute("aria-current") is None
    )
    assert page.evaluate("document.activeElement.closest('li') === document.querySelectorAll('#prompts li')[2]")
    assert "Prompt, row 0" in page.locator("#prompt").inner_text()


def test_the_answers_of_every_seed_are_there(seeds: Path, open_page: Callable[..., Any]):
    page = open_page(seeds)
    page.locator("#prompts button").filter(has_text="0 + 1 =").click()
    side = page.locator(".side").first
    assert "wrong" in side.locator(".facts").inner_text()
    assert "1/2" in page.locator("#prompts button").filter(has_text="0 + 1 =").inner_text()
    side.get_by_role("button", name="a (2 seeds), seed 2").click()
    assert "right" in page.locator(".side").first.locator(".facts").inner_text()
    assert page.evaluate("document.activeElement.textContent") == "2"


def test_the_side_by_side_begins_with_a_seed_that_all_groups_have(tmp_path: Path, open_page: Callable[..., Any]):
    pairs = [("a", s, 1e-3) for s in (0, 1, 2)] + [("b", s, 1e-4) for s in (1, 2)]
    runs = [write_compared(tmp_path / f"{n}-s{s}", seed=s, samples=True, optimizer__lr=lr) for n, s, lr in pairs]
    page = open_page(page_of(*runs))
    pressed = page.locator('.seeds [aria-pressed="true"]')
    assert pressed.all_inner_texts() == ["1", "1"]
    page.get_by_role("button", name="b (2 seeds), seed 2").click()
    assert pressed.all_inner_texts() == ["2", "2"]
    page.get_by_role("button", name="a (3 seeds), seed 0").click()
    assert pressed.all_inner_texts() == ["0", "1"]


def test_the_printed_page_cuts_no_table(seeds: Path, open_page: Callable[..., Any]):
    page = open_page(seeds, viewport={"width": 720, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("document.querySelector('#result table').getBoundingClientRect().right <= innerWidth")


def test_tokens_have_the_colour_of_their_kl_and_the_first_other_one_is_marked(
    tmp_path: Path, open_page: Callable[..., Any]
):
    runs = []
    for name, tokens, kl in (("one", (" 4", "2", "\n"), (0.0, 0.02, 5.0)), ("two", (" 4", "3", "\n"), (0.0, 0.2, 0.0))):
        run = write_compared(tmp_path / name, objective__top_k=len(runs))
        with RunRecorder(run, resume_step=4) as recorder:
            recorder.sample(a_sample(4, tokens=tokens, reverse_kl=kl, prompt_index=0))
        runs.append(run)
    page = open_page(page_of(*runs))
    one, two = (page.locator(".side").nth(i).locator(".t") for i in (0, 1))
    assert [one.nth(i).get_attribute("class") for i in range(3)] == ["t k0", "t k1", "t k6"]
    assert [two.nth(i).get_attribute("class") for i in range(3)] == ["t k0", "t k3 parted", "t k0"]
    assert one.nth(2).inner_text().startswith("↵")
    assert one.nth(2).get_attribute("title").endswith("5 nats")


def test_an_interval_that_holds_zero_is_drawn_hollow_and_said(tmp_path: Path, open_page: Callable[..., Any]):
    one = write_compared(tmp_path / "one", right=(0, 0, 0, 1), kl=(0.1, 0.2, 0.3, 0.4))
    two = write_compared(tmp_path / "two", right=(0, 1, 1, 1), kl=(0.05, 0.15, 0.15, 0.25), optimizer__lr=1e-4)
    page = open_page(page_of(one, two))
    accuracy, kl = (page.locator(".axis").nth(i).locator(".bar").first for i in (0, 1))
    assert "unclear" in accuracy.get_attribute("class") and "unclear" not in kl.get_attribute("class")
    label = accuracy.locator("svg").get_attribute("aria-label")
    assert label == "B − A: +50.0 [−16.6, +83.2] points, paired, 4 prompts"
    at = {
        part: float(kl.locator(part).first.get_attribute(x).rstrip("%"))
        for part, x in (("circle", "cx"), (".zero", "x1"))
    }
    assert at["circle"] < at[".zero"]  # less than nothing is on the left


def test_hostile_names_and_texts_are_text(tmp_path: Path, open_page: Callable[..., Any]):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{{ 7*7 }}\x1b[31m"
    runs = []
    for index, name in enumerate(("<img src=x onerror=alert(3)>", "\u202egpj.exe\x1b[2J")):
        run = write_compared(tmp_path / name, objective__note=bad, seed=index, optimizer__lr=index)
        with RunRecorder(run, resume_step=4) as recorder:
            recorder.step(4, {bad: 1.0 + index})
            recorder.step(5, {bad: 2.0})
            tokens = (bad, "\u0645\u0631", "{{ 7*7 }}", "\ud83d", "\n")
            recorder.sample(a_sample(4, prompt=bad, tokens=tokens, answer=bad, prompt_index=0, reverse_kl=(9.0,) * 5))
        runs.append(run)
    page = open_page(page_of(*runs))
    assert page.locator("main img, .side script").count() == 0
    text = page.locator("body").inner_text()
    assert "\u202e" not in page.locator(".runs").inner_text() and "\\u202e" in text
    assert "⟨U+202E⟩" in page.locator(".response").first.inner_text()
    places = (
        page.locator(".side")
        .first.locator(".t")
        .evaluate_all("all => all.slice(1, 3).map(t => t.getBoundingClientRect())")
    )
    assert places[0]["x"] < places[1]["x"] or places[0]["y"] < places[1]["y"]


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE])
def test_nothing_is_wider_than_the_window(seeds: Path, open_page: Callable[..., Any], options: dict[str, Any]):
    page = open_page(seeds, **options)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.emulate_media(media="print")
    assert page.locator("#result").is_visible() and page.locator(".side").first.is_visible()


def test_runs_without_answers_have_no_empty_section(tmp_path: Path, open_page: Callable[..., Any]):
    one, two = (write_compared(tmp_path / name, optimizer__lr=i) for i, name in enumerate(("one", "two")))
    page = open_page(page_of(one, two))
    assert page.locator("#answers").count() == 0 and page.locator("#result").count() == 1


def test_what_is_not_comparable_is_said_at_the_top(tmp_path: Path, open_page: Callable[..., Any]):
    one = write_compared(tmp_path / "one")
    two = write_compared(tmp_path / "two", measure="m2", eval__temperature=0.0)
    page = open_page(page_of(one, two))
    assert "eval.temperature is 1.0 in one and 0.0 in two" in page.locator("ul.notice").inner_text()
    assert "not comparable" in page.locator(".axis").first.inner_text()
    assert page.locator(".axis circle").count() == 0


@pytest.mark.slow
def test_eight_runs_of_3000_steps_are_ready_in_time(tmp_path: Path, open_page: Callable[..., Any]):
    runs = []
    for index in range(8):
        run = tmp_path / f"run{index}"
        write_compared(run, seed=index // 4, optimizer__lr=1e-3 * (1 + index % 4), samples=True)
        with RunRecorder(run, resume_step=0) as recorder:
            for step in range(3000):
                noise = math.sin(12.9898 * step + index) * 43758.5453 % 1
                names = (
                    "loss",
                    "reverse_kl",
                    "forward_kl",
                    "student_entropy",
                    "teacher_entropy",
                    "response_length",
                    "tokens",
                )
                recorder.step(step, dict.fromkeys((*names, "grad_norm", "lr", "time/step"), noise + 100 / (step + 50)))
                if step % 100 == 0:
                    recorder.evaluation(step, "student", {"accuracy": noise}, {"accuracy": (0.0, 1.0)}, "m1")
        write_summary(run / "summary.json", {})
        runs.append(run)
    began = time.perf_counter()
    place = page_of(*runs)
    written = time.perf_counter() - began
    page = open_page(place)
    ready = page.evaluate("performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart") / 1000
    print(f"written in {written:.2f} s, ready in {ready:.2f} s, {place.stat().st_size / 1e6:.2f} MB")
    assert ready < READY_IN
    assert place.stat().st_size < LARGEST
