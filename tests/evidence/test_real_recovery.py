"""Recovery on a real model: prompts, constraints, intervals and the page; every arm takes two steps with a tiny model."""

import numpy as np
import pytest
from benchmarks.markdown import END
from benchmarks.real import chat
from benchmarks.real.recovery import plan, report
from benchmarks.real.recovery.command import DOCS, FIGURE, PAGE, START, TABLE, smoke
from benchmarks.real.recovery.figure import scatter
from benchmarks.real.recovery.instructions import INSTRUCTIONS
from benchmarks.real.store import Row

ANSWERS = {
    "one word": (0, ["Blue.", " red"], ["Light blue", "Blue is a colour."]),
    "at most 20 words": (4, ["It turns scraps into soil."], ["Compost", " ".join(["word"] * 21)]),
    "keyword": (8, ["I drink coffee every Morning."], ["I drink coffee every day.", "Mornings are good", "morning"]),
    "lower case": (12, ["it is a place without light."], ["It is a place without light.", "a place"]),
    "numbered lines": (16, ["1. a\n2. b\n3. c", "1) a\n\n 2) b\n3) c"], ["1. a\n2. b", "1. a\n3. b\n2. c", "a, b, c", "1. a\n2. b\n3. c\n4. d"]),
    "ending": (20, ["Knitting is calm, and that is all.", 'I knit socks. "That is all!"'], ["that is all", "That is all I know about it."]),
    "yes or no": (24, ["Yes.", "yes, it is"], ["No.", "Yes and no.", "Ice is cold, yes."]),
    "beginning": (28, ["Today we play football."], ["today we play football.", "We play football Today.", "Today"]),
    "no comma": (32, ["It is a place without light."], ["It is dark, cold."]),
    "short fact": (36, ["It is Rome."], ["It is Milan.", "Romeo"]),
}  # fmt: skip
"""By kind: the first instruction of it, answers that meet the constraint, and answers that do not."""


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_check_accepts_what_meets_the_constraint_and_nothing_else(kind):
    number, good, bad = ANSWERS[kind]
    one = INSTRUCTIONS[number]
    assert one.kind == kind
    assert [one.satisfied(answer, finished=True) for answer in good] == [True] * len(good)
    assert [one.satisfied(answer, finished=True) for answer in bad] == [False] * len(bad)
    assert not one.satisfied(good[0], finished=False)
    assert not one.satisfied(" ", finished=True)


def test_every_kind_of_constraint_has_four_prompts_and_a_test():
    kinds = [one.kind for one in INSTRUCTIONS]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(ANSWERS, 4)
    assert len({one.prompt for one in INSTRUCTIONS}) == len(INSTRUCTIONS)


def test_held_out_prompts_have_topics_of_their_own_and_all_prompts_differ():
    training, held_out = [*chat.training(), *chat.tuning()], chat.held_out()
    assert len(set(training)) == len(training)
    assert len(set(training)) == len(training) >= plan.STEPS * plan.CHAT
    assert len(set(held_out)) == len(held_out) == chat.HELD_OUT
    topics = {topic for topic in chat.HELD_OUT_TOPICS for text in held_out if topic in text}
    assert len(topics) == len(chat.HELD_OUT_TOPICS)
    assert not [text for text in training for topic in chat.HELD_OUT_TOPICS if topic in text]


def test_an_interval_is_as_wide_as_prompts_and_seeds_differ():
    by_prompt = np.tile(np.arange(48.0), (3, 1))
    by_seed = np.tile([[0.0], [1.0], [2.0]], (1, 48))
    wide = report.interval(by_prompt)
    standard_error = by_prompt[0].std() / 48**0.5
    assert wide.value == 23.5
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    assert report.interval(by_seed).text(1) == "1.0 (0.0 to 2.0)"
    assert report.interval(np.ones((3, 48))).text(0, 100) == "100 (100 to 100)"


def test_pairs_of_prompts_stay_pairs():
    values = np.random.default_rng(1).uniform(1, 9, (3, 48))
    assert report.ratio(3 * values, values).text(6) == "3.000000 (3.000000 to 3.000000)"
    assert report.difference(values + 0.5, values).text(6) == "0.500000 (0.500000 to 0.500000)"
    apart = report.ratio(values, values[:, ::-1])
    assert apart.low < 1 < apart.high


def line(setting: plan.Setting, kl: float) -> Row:
    """A finished run whose KLs are all `kl`, and which meets every second constraint."""
    own = " ".join([f"{kl}"] * chat.HELD_OUT)
    everything = setting.seed != plan.TUNING_SEED
    half = " ".join("10"[number % 2] for number in range(len(INSTRUCTIONS)))
    results = {"skill": "0.25", "reverse_kl": own, "forward_kl": own, "training_tokens": "7000", "cpu_seconds": "400"}
    results |= {"forward_kl_on_original": own, "satisfied": half} if everything else {}
    blank = dict.fromkeys(plan.RESULTS, "")
    return Row(dict(zip(plan.SETTING, setting.key, strict=True)) | blank | results)


def test_the_page_has_arms_with_all_their_seeds_at_the_rate_that_left_least(tmp_path):
    store = plan.store(tmp_path / "recovery.csv")
    for one in plan.baselines((plan.TUNING_SEED, *plan.SEEDS)):
        store.add(line(one, 0.0 if one.arm == plan.ORIGINAL else 2.0))
    for one in plan.grid():
        store.add(line(one, 0.5 if one.lr == plan.ARMS[one.arm].rates[-1] else 0.75))
    wanted = plan.reported(store)
    assert {one.lr for one in wanted} == {plan.ARMS["opd"].rates[-1]}
    for one in wanted[:-1]:  # the last arm lacks its last seed
        store.add(line(one, 0.25 if one.arm == "opd" else 0.375))
    page = report.page(plan.store(store.path))
    main = page.split("## OPD against")[0]
    assert "| OPD, reverse KL | 0.0001 | 0.250 (0.250 to 0.250) |" in main
    assert " | 50 (" in main and " | 25.0 (25.0 to 25.0) | 7000 | 400 |" in main
    assert plan.ARMS[wanted[-1].arm].title not in main
    assert "| OPD, reverse KL | 12.5 (12.5 to 12.5) |" in page and "| 100.0 (100.0 to 100.0) |" in page
    assert "| the damaged model | 8.00 (8.00 to 8.00) |" in page
    assert "| SFT on the original's answers | 1.50 (1.50 to 1.50) |" in page
    assert "| OPD, reverse KL | 0.750, 0.750, 25 % | **0.500, 0.500, 25 %** |" in page
    assert store.missing(wanted) == wanted[-1:]


def test_before_the_last_seed_the_page_is_of_those_that_all_arms_have(tmp_path):
    store = plan.store(tmp_path / "recovery.csv")
    for one in plan.baselines((plan.TUNING_SEED, *plan.SEEDS)):
        store.add(line(one, 0.0 if one.arm == plan.ORIGINAL else 2.0))
    for one in plan.grid():
        store.add(line(one, 0.5))
    assert report.seeds_of(report.groups(store)) == 0 and report.headline(report.groups(store)) == ""
    for one in plan.reported(store):
        if one.seed < 2 and (one.arm, one.seed) != ("sft", 1):
            store.add(line(one, 0.25))
    found = report.groups(store)
    assert {len(group.rows) for arm, group in found.items() if arm != plan.ORIGINAL} == {2}
    assert set(found) == {plan.ORIGINAL, plan.DAMAGED, *plan.ARMS} - {"sft"}
    assert "bootstrap over 2 seeds" in report.page(store)
    assert "12.5 (12.5 to 12.5) % of the damaged model's reverse KL is left" in report.headline(found)


@pytest.mark.skipif(not TABLE.exists(), reason="no results are kept yet")
def test_the_page_is_what_the_table_gives():
    assert PAGE.read_text("utf-8") == report.page(plan.store(TABLE))


@pytest.mark.skipif(not TABLE.exists(), reason="no results are kept yet")
def test_the_docs_and_the_figure_are_what_the_table_gives():
    found = report.groups(plan.store(TABLE))
    quoted = DOCS.read_text("utf-8").split(START)[1].split(END)[0]
    assert quoted.strip() == report.headline(found).strip()
    assert FIGURE.read_text("utf-8") == scatter(found)


def test_two_updates_of_a_tiny_model_bring_it_nearer_to_its_original(tmp_path):
    arms = ["two_teachers", "off_policy", "mixing"]  # of the two that are left, `--smoke` shows that they run
    rows = {row["arm"]: row for row in smoke(tmp_path, arms)}
    assert list(rows) == [plan.ORIGINAL, plan.DAMAGED, *arms]
    assert plan.mean(rows[plan.ORIGINAL], "reverse_kl") == 0
    start = plan.mean(rows[plan.DAMAGED], "reverse_kl")
    for arm in arms:
        row = rows[arm]
        assert len(row.series("satisfied")) == len(INSTRUCTIONS)
        assert plan.mean(row, "reverse_kl") != start
        assert row.number("training_tokens") > 0
    assert plan.mean(rows["two_teachers"], "reverse_kl") < 0.8 * start
    assert plan.mean(rows["off_policy"], "forward_kl_on_original") < plan.mean(
        rows[plan.DAMAGED], "forward_kl_on_original"
    )
