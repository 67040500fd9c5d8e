"""The token viewer in a real browser: what a click, a key, a filter and a link show."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser.waiting import until
from opd.reporting import SampleRecord, write_report
from reporting.report_inputs import a_sample
from reporting.token_details import detailed, write_samples

Opened = Callable[..., Any]
PHONE = {"viewport": {"width": 420, "height": 860}}
ANSWER = (" 24", " +", " 18", " is", " 41")


def sums(step: int = 0, **changes: Any) -> SampleRecord:
    """24 + 18 answered by 41, where the teacher wanted 42; the second worst token is the first."""
    values: dict[str, Any] = {
        "kl": (0.8, 0.001, 0.002, 0.05, 5.0 - step / 10),
        "wanted": (" 2", " +", " 18", " is", " 42"),
        "step": step,
        "prompt": "24 + 18 =",
        "answer": "42",
        "reward": 0.0,
        "prompt_index": 0,
    }
    return detailed(ANSWER, **{**values, **changes})


def teachers() -> SampleRecord:
    tokens = (" It", " is", " 42")
    return detailed(
        tokens, kl=(0, 0, 0), who="teacher", source="teacher", prompt="24 + 18 =", prompt_index=0, reward=1.0
    )


def easy(step: int = 0, **changes: Any) -> SampleRecord:
    values: dict[str, Any] = {"step": step, "prompt": "1 + 1 =", "prompt_index": 1, "kl": (0.3, 0.02), "reward": 1.0}
    return detailed((" 2", "\n"), **{**values, **changes})


@pytest.fixture
def view(tmp_path: Path, open_page: Opened) -> Opened:
    """Opens the page of some samples; `at` is the part of its address after the #."""

    def opened(*samples: SampleRecord, at: str = "", **options: Any) -> Any:
        path = write_report(write_samples(tmp_path / "run", *samples))
        page = open_page(path, **options)
        if at:
            page.evaluate("(at) => { location.hash = at; }", at)
            page.reload()
        return page

    return opened


def run_samples() -> list[SampleRecord]:
    return [teachers(), *(make(step) for step in (0, 5, 10) for make in (sums, easy))]


def token(page: Any, number: int) -> Any:
    """The element of token `number`, from 1."""
    return page.locator(f"#viewer-text [data-i='{number - 1}']")


def chosen(page: Any) -> str | None:
    return page.locator("#viewer-text .chosen").get_attribute("aria-label")


def rows(page: Any, who: str) -> list[str]:
    """The bars of one model as "' 42' 80%"."""
    column = page.locator(".viewer-bars").nth(0 if who == "teacher" else 1)
    name, share = (column.locator(f".viewer-{part}").all_inner_texts() for part in ("name", "share"))
    return [" ".join(pair) for pair in zip(name, share, strict=True)]


def test_two_clicks_say_which_token_the_teacher_disliked_most_and_what_it_wanted(view: Opened):
    page = view(*run_samples())
    first = page.locator("#viewer-by-token tr").first
    assert first.locator("th").inner_text() == "' 41'"
    assert first.locator(".viewer-wanted").inner_text().replace("\n", "") == "' 42'80%3×"
    first.locator("button").click()
    assert page.locator(".viewer-sentence").inner_text() == (
        "The teacher wanted ' 42' (80%). The student sampled ' 41', to which the teacher gives 0.30%."
    )
    assert chosen(page) == "token 5, ' 41', reverse KL 5 nats, the teacher's first choice is ' 42' 80%"
    assert page.locator("#viewer-name").inner_text() == "Student, step 0", "the costliest occurrence"


def test_a_click_on_a_token_shows_both_models_and_the_sampled_token_always(view: Opened):
    page = view(sums())
    token(page, 1).click()
    assert rows(page, "teacher")[0] == "' 2' 80%"
    assert rows(page, "teacher")[-1] == "' 24' 0.30%", "outside its five likeliest"
    assert len(rows(page, "teacher")) == 6
    assert rows(page, "student")[0] == "' 24' 40%"
    assert len(rows(page, "student")) == 5, "the sampled token is among them"
    cells = page.locator(".viewer-numbers td").all_inner_texts()
    assert cells[1:3] == ["40%", "0.30%"]
    assert "−0.916" in cells and "−5.81" in cells, "log-probs"
    assert cells[-3:] == ["1.6", "0.7", "–"], "entropies"
    place = page.locator(".viewer-place").inner_text()
    assert place == "reverse KL 0.8 nats · token 1 of 5 · number 2 by cost"


def test_n_and_p_go_through_the_tokens_by_cost(view: Opened):
    page = view(sums())
    page.keyboard.press("Escape")
    seen = []
    for _ in range(6):
        page.keyboard.press("n")
        seen.append(page.evaluate("Number(document.activeElement.dataset.i) + 1"))
    assert seen == [5, 1, 4, 3, 2, 2]
    page.keyboard.press("p")
    assert page.evaluate("document.activeElement.dataset.i") == "2"


def test_the_keyboard_alone_moves_between_tokens_and_samples(view: Opened):
    page = view(*run_samples())
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    page.keyboard.press("ArrowLeft")
    assert (chosen(page) or "").startswith("token 4,")
    page.keyboard.press("ArrowRight")
    assert (chosen(page) or "").startswith("token 5,")
    page.keyboard.press("Escape")
    assert page.locator("#viewer-panel .viewer-bars").count() == 0
    page.keyboard.press("ArrowLeft")
    assert page.locator("#viewer-panel .viewer-bars").count() == 0, "moves only, until Enter"
    page.keyboard.press("Enter")
    assert (chosen(page) or "").startswith("token 4,")
    before = page.locator("#viewer-about").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator("#viewer-about").inner_text() != before
    page.keyboard.press("ArrowUp")
    assert page.locator("#viewer-about").inner_text() == before


def test_keys_do_nothing_while_somebody_types(view: Opened):
    page = view(*run_samples())
    before = chosen(page)
    page.locator("#viewer-search").focus()
    page.keyboard.type("np")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    assert page.locator("#viewer-search").input_value() in ("np", "")
    assert page.locator("#viewer-list [data-n]").count() in (0, 6)
    assert chosen(page) == before


def test_every_token_is_a_button_with_a_label_and_one_takes_the_tab_key(view: Opened):
    page = view(sums())
    tokens = page.locator("#viewer-text .tok")
    assert [t.get_attribute("role") for t in tokens.all()] == ["button"] * 5
    assert all(t.get_attribute("aria-label") for t in tokens.all())
    assert page.locator("#viewer-text .tok[tabindex='0']").count() == 1


def test_samples_are_listed_worst_first(view: Opened):
    page = view(*run_samples())
    means = [float(text) for text in page.locator(".viewer-swatch").all_inner_texts()]
    assert means == sorted(means, reverse=True) and len(means) == 6
    page.select_option("#viewer-sort", "latest")
    facts = page.locator("#viewer-list .note").all_inner_texts()
    assert [int(re.findall(r"step (\d+)", fact)[0]) for fact in facts] == [10, 10, 5, 5, 0, 0]


def test_filters_choose_the_samples_and_the_tables_follow(view: Opened):
    cut = easy(3, finished=False, teacher="maths", phase="train", prompt_index=9)
    page = view(*run_samples(), cut, easy(3, teacher="code", prompt_index=8))
    count = page.locator("#viewer-list [data-n]")
    assert count.count() == 8, "the students' at first"
    for name, value, expected in (
        ("reward", "wrong", 3),
        ("end", "cut", 1),
        ("teacher", "maths", 1),
        ("phase", "train", 1),
        ("step", "10", 2),
        ("by", "teacher", 1),
    ):
        page.select_option(f"#viewer-filter-{name}", value)
        assert count.count() == expected, name
        assert f"over {expected} sample" in page.locator("#viewer-cost-of").inner_text()
        page.select_option(f"#viewer-filter-{name}", "student" if name == "by" else "")
    page.fill("#viewer-search", "24 + 18")
    assert count.count() == 3
    page.fill("#viewer-search", "no such words")
    assert "No response passes" in page.locator("#viewer-list").inner_text()


def test_the_slider_goes_over_the_steps_of_the_prompt(view: Opened):
    page = view(*run_samples())
    slider = page.locator("#viewer-step")
    assert (slider.get_attribute("max"), slider.input_value()) == ("2", "0")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-name").inner_text() == "Student, step 5"
    page.keyboard.press("End")
    assert page.locator("#viewer-name").inner_text() == "Student, step 10"
    assert page.locator("#viewer-prompt").inner_text().startswith("24 + 18 =")
    assert page.locator("#viewer-step-name").inner_text() == "step 10"
    bars = page.evaluate("[...document.querySelectorAll('#viewer-spark span')].map(e => getComputedStyle(e).opacity)")
    assert bars == ["1", "1", "1"], "the bar of the shown step is seen, too"


def test_the_teachers_own_answer_stands_beside_the_students(view: Opened):
    page = view(*run_samples())
    assert page.locator("#viewer-teacher-text").inner_text() == " It is 42"
    student, teacher = (page.locator(f"#viewer-{name}").bounding_box() for name in ("text", "teacher-text"))
    assert teacher["x"] > student["x"] + student["width"] and abs(teacher["y"] - student["y"]) < 2
    page.locator("#viewer-teacher-link").click()
    assert page.locator("#viewer-name").inner_text() == "Teacher, step 0"


@pytest.mark.parametrize(
    ("scale", "classes"),
    [
        ("kl", ["kl-4", "kl-0", "kl-0", "kl-2", "kl-6"]),
        ("difference", ["difference-0", *["difference-3"] * 3, "difference-0"]),
        ("entropy", ["entropy-4", *["entropy-2"] * 3, "entropy-4"]),
        ("relative", ["kl-1", "kl-0", "kl-0", "kl-0", "kl-3"]),
    ],
)
def test_colours_follow_what_is_chosen_and_so_does_the_legend(view: Opened, scale: str, classes: list[str]):
    page = view(sums())
    page.select_option("#viewer-scale", scale)
    found = page.locator("#viewer-text .ink").evaluate_all("all => all.map((e) => e.className.replace('ink ', ''))")
    assert found == classes
    family = classes[0].split("-")[0]
    assert page.locator("#viewer-legend .viewer-chip").count() == 7
    assert page.locator("#viewer-legend .viewer-chip").last.get_attribute("class") == f"viewer-chip {family}-6"


def test_a_link_opens_its_sample_and_token(view: Opened):
    page = view(*run_samples(), at="sample-3-token-2")
    assert page.locator("#viewer-about").inner_text().startswith("sample 3 ·")
    assert (chosen(page) or "").startswith("token 2,")
    token(page, 1).click()
    assert page.evaluate("location.hash") == "#sample-3-token-1"
    assert page.locator(".viewer-link").get_attribute("href") == "#sample-3-token-1"
    page.evaluate("() => { location.hash = '#sample-1'; }")
    until(page, "document.getElementById('viewer-name').textContent === 'Teacher, step 0'")


def test_old_records_show_their_kl_and_say_what_is_missing(view: Opened):
    page = view(a_sample(tokens=("a", " b"), reverse_kl=(0.5, 7.0)))
    token(page, 2).click()
    assert page.locator(".viewer-place").inner_text() == "reverse KL 7 nats · token 2 of 2 · the costliest"
    panel = page.locator("#viewer-panel").inner_text()
    assert "holds no log-probs, entropies or likeliest tokens" in panel and "were not recorded" in panel
    assert page.locator("#viewer-text .ink").last.get_attribute("class") == "ink kl-6"
    page.select_option("#viewer-scale", "entropy")
    assert "Not recorded in this sample" in page.locator("#viewer-legend").inner_text()
    assert page.locator("#viewer-by-token .viewer-wanted").first.inner_text() == "not recorded"


def test_a_response_that_nobody_scored_is_shown(view: Opened):
    page = view(a_sample(reverse_kl=None), a_sample(tokens=(), response="as text", prompt="other"))
    page.keyboard.press("n")
    assert "as text" in page.locator("#viewer-text").inner_text() or page.locator("#viewer-text .tok").count() == 2


def test_the_table_by_place_has_buckets_that_double(view: Opened):
    page = view(detailed(tuple("abcdefghi"), kl=(1, 2, 2, 4, 4, 4, 4, 8, 9)))
    cells = [row.locator("th, td").all_inner_texts() for row in page.locator("#viewer-by-position tr").all()]
    assert cells == [
        ["1", "1", "1.0", "1.000"],
        ["2 – 3", "2", "4.0", "2.000"],
        ["4 – 7", "4", "16.0", "4.000"],
        ["8 – 15", "2", "17.0", "8.500"],
    ]
    page.locator("#viewer-by-position button").last.click()
    assert (chosen(page) or "").startswith("token 9,")


def test_without_a_script_the_responses_are_there_as_text(tmp_path: Path, open_page: Opened):
    page = open_page(write_report(write_samples(tmp_path / "run", *run_samples())), java_script_enabled=False)
    assert "need JavaScript" in page.locator("#viewer").inner_text()
    assert " 24 + 18 is 41" in page.locator(".viewer-plain").inner_text()
    assert not page.locator("#viewer-app").is_visible()
