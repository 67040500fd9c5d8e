"""Prompt files and rewards that do not hold what the recipe asks of them."""

from __future__ import annotations

import pytest
from opd_user import User

from opd.testing import digit_tokenizer, tiny_causal_lm


def test_a_missing_prompt_file_is_answered_with_its_neighbour(user: User):
    path = str(user.desk.prompts).replace("prompts", "promts")
    user.train(prompts__path=path).refuses("does not exist", "did you mean", "prompts.jsonl")


def test_a_missing_evaluation_file_is_refused(user: User):
    user.train(prompts__eval_path="nowhere.jsonl", eval__every=1).refuses(
        "nowhere.jsonl does not exist", "check the path"
    )


def test_an_unknown_format_lists_the_known_ones(user: User):
    user.train(prompts__path=user.writes("rows.csv", "prompt\n1>\n")).refuses("'.csv'", "not a prompt format", ".jsonl")


def test_an_empty_data_set_is_refused(user: User):
    user.train(prompts__path=user.writes_prompts()).refuses("has no rows", "nothing to sample from", "give a data set")
    user.train(prompts__limit=0).refuses("leaves no prompts", "use 1 or more")


def test_a_line_that_is_not_json_is_named(user: User):
    path = user.writes("rows.jsonl", '{"prompt": "1>"}\n{prompt: 2}\n')
    user.train(prompts__path=path).refuses("line 2", "is not JSON", "one JSON object")


def test_a_missing_prompt_column_is_answered_with_the_columns_there(user: User):
    outcome = user.train(prompts__prompt_column="promt")
    outcome.refuses("no column 'promt'", "Columns there: 'answer', 'prompt'", "Did you mean 'prompt'?", "prompt_column")


def test_a_missing_answer_column_is_named(user: User):
    user.train(prompts__answer_column="gold").refuses("answer column 'gold'", "Columns there", "Set answer_column")


@pytest.mark.parametrize("reward", ["exact_match", "numeric_answer", "regex:.*"])
def test_a_reward_that_compares_needs_answers_and_costs_no_old_run(user: User, reward: str):
    before = user.has_finished_run()
    held_out = user.writes_prompts({"prompt": "1>", "answer": "1"}, {"prompt": "2>"})
    outcome = user.train("--overwrite", prompts__eval_path=held_out, eval__every=1, eval__reward=reward)
    outcome.refuses("Row 1", "has no answer", f"eval.reward={reward}", "Add an 'answer' column")
    assert user.files() == before


def test_an_empty_prompt_is_named(user: User):
    path = user.writes_prompts({"prompt": "1>"}, {"prompt": " "})
    user.train(prompts__path=path).refuses("line 2", "is empty", "remove the row")


def test_a_prompt_the_tokenizer_cannot_spell_is_named(user: User):
    path = user.writes_prompts({"prompt": "1>"}, {"prompt": "sort 21"})
    user.train(prompts__path=path).refuses("prompt 1 cannot be tokenised", "student")


def test_chat_messages_without_a_chat_template_are_refused(user: User):
    path = user.writes_prompts({"prompt": [{"role": "user", "content": "12>"}]})
    user.train(prompts__path=path).refuses("list of messages", "no chat template", "write the prompts as text")


def test_a_system_message_has_no_place_in_plain_text(user: User):
    user.train(prompts__system="be brief").refuses("plain text", "no place for the system message", "leave the system")


def test_a_template_argument_that_nothing_reads_is_refused(user: User):
    outcome = user.train("--student.chat_template_kwargs", "{enable_thinking: false}")
    outcome.refuses("does not read 'enable_thinking'", "would change nothing", "check the spelling")


def test_a_prompt_longer_than_the_students_context_is_named(user: User):
    path = user.writes_prompts({"prompt": "1>"}, {"prompt": "1" * 61})
    outcome = user.train(prompts__path=path)
    outcome.refuses("prompt 1 has 61 tokens", "65", "context of student", "is 64", "lower max_new_tokens")


def test_a_prompt_that_fits_the_student_but_not_the_teacher_is_named(user: User):
    tokenizer = digit_tokenizer()
    small = tiny_causal_lm(tokenizer, layers=1, hidden=16, heads=2, kv_heads=1, max_positions=16)
    path = user.writes_prompts({"prompt": "1>"}, {"prompt": "1" * 13})
    outcome = user.train(prompts__path=path, teacher__model=user.saves("small", small, tokenizer))
    outcome.refuses("prompt 1 has 13 tokens", "17", "context of teacher", "is 16", "Shorten or remove the prompt")


def test_a_held_out_prompt_longer_than_the_context_is_found_before_the_first_step(user: User):
    before = user.has_finished_run()
    path = user.writes_prompts({"prompt": "1" * 61, "answer": "1"})
    outcome = user.train("--overwrite", prompts__eval_path=path, eval__every=1)
    outcome.refuses("prompt 0 has 61 tokens", "context of student")
    assert user.files() == before


def test_off_policy_samples_need_responses_in_every_row(user: User):
    before = user.has_finished_run()
    path = user.writes_prompts({"prompt": "21>", "response": "12"}, {"prompt": "31>"})
    outcome = user.train("--overwrite", prompts__path=path, rollout__lmbda=0.99)
    outcome.refuses("Row 1", "has no response", "rollout.lmbda=0.99", "off_policy=teacher", "rollout.lmbda=1")
    assert user.files() == before


def test_a_stop_string_the_student_cannot_write_is_refused(user: User):
    user.train(rollout__stop="END").refuses("rollout.stop='END' can never occur", "Use another string")


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ("exact_mach", "Did you mean 'exact_match'?"),
        ("no_such_package.rewards:score", "importing 'no_such_package.rewards' failed"),
        ("os.path:joyn", "did you mean 'join'?"),
        ("os.path:sep", "is not a function of (prompt, response)"),
        ("json:JSONDecoder", "a reward is called as reward(prompt, response)"),
        ("regex:(", "not a regular expression"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_before_the_run(user: User, reward: str, what: str):
    before = user.has_finished_run()
    outcome = user.train("--overwrite", prompts__eval_path=user.desk.prompts, eval__every=1, eval__reward=reward)
    outcome.refuses(f"reward '{reward}'", what)
    assert user.files() == before


def test_a_reward_that_fails_names_the_prompt(user: User):
    outcome = user.train(prompts__eval_path=user.desk.prompts, eval__every=1, eval__reward="os.path:join")
    outcome.refuses("reward 'join' failed on prompt 0", "TypeError", "Fix the function")


def test_control_characters_of_a_file_do_not_reach_the_terminal(user: User):
    path = user.writes("rows.jsonl", "\x1b]0;title\x07\u202e not json\n")
    outcome = user.train(prompts__path=path)
    outcome.refuses("line 1", "\\x1b]0;title\\x07\\u202e not json")
    assert not {"\x1b", "\x07", "\u202e"} & set(outcome.out + outcome.err)


@pytest.mark.parametrize("name", ["\x1b[2J", "a\ud800"])
def test_control_characters_of_a_name_do_not_reach_the_terminal(user: User, name: str):
    rows = [{"prompt": "1>", "teacher": name}, {"prompt": "2>", "teacher": "other"}]
    outcome = user.train(prompts__path=user.writes_prompts(*rows))
    assert outcome.code == 1 and "Traceback" not in outcome.err and not {"\x1b", "\ud800"} & set(outcome.err)
