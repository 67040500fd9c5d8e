import time

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from opd.errors import VocabularyError
from opd.teachers.vocabulary import VocabularyMatch, check_vocabularies
from opd.testing import byte_tokenizer, digit_tokenizer


def word_tokenizer(tokens: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(tokens)), **special)


def check(student, teacher, student_rows=None, teacher_rows=None, **eos) -> VocabularyMatch:
    return check_vocabularies(
        student,
        teacher,
        max(student.get_vocab().values()) + 1 if student_rows is None else student_rows,
        max(teacher.get_vocab().values()) + 1 if teacher_rows is None else teacher_rows,
        student_name="small",
        teacher_name="big",
        **eos,
    )


def test_one_tokenizer_matches_itself_over_all_its_tokens():
    assert check(digit_tokenizer(), digit_tokenizer()) == VocabularyMatch(size=13)


def test_padded_embeddings_of_different_sizes_are_accepted():
    assert check(digit_tokenizer(), digit_tokenizer(), 64, 128) == VocabularyMatch(size=13)


def test_permuted_vocabulary_is_refused_with_ids_and_both_strings():
    student = word_tokenizer({"a": 0, "b": 1, "c": 2})
    teacher = word_tokenizer({"a": 0, "c": 1, "b": 2})
    with pytest.raises(VocabularyError) as error:
        check(student, teacher)
    message = str(error.value)
    assert "student 'small' and teacher 'big'" in message
    assert "2 of 3 shared ids differ" in message
    assert "1 is 'b' to the student and 'c' to the teacher; 2 is 'c' to the student and 'b' to the teacher" in message
    assert "one model family" in message


def test_at_most_five_differing_ids_are_shown():
    student = word_tokenizer({f"s{i}": i for i in range(9)})
    teacher = word_tokenizer({f"t{i}": i for i in range(9)})
    with pytest.raises(VocabularyError, match="9 of 9 shared ids differ") as error:
        check(student, teacher)
    assert "4 is 's4' to the student and 't4' to the teacher" in str(error.value)
    assert "5 is" not in str(error.value)


def test_an_added_token_that_the_two_spell_differently_is_masked_and_named_in_a_warning():
    tokenizers = byte_tokenizer(extra_tokens=["<think>", "<a>"]), byte_tokenizer(extra_tokens=["<tool>", "<a>"])
    match = check(*tokenizers, student_eos=[257], teacher_eos=[257, 258])
    assert "258 is '<think>' to the student and '<tool>' to the teacher" in match.warnings[0]
    assert (match.size, match.invalid_ids, len(match.warnings)) == (260, (258,), 1)


@pytest.mark.parametrize("ends", [([258], [257]), ([257], [258])])
def test_added_tokens_spelt_differently_are_refused_where_a_model_would_be_left_without_an_end(ends):
    tokenizers = byte_tokenizer(extra_tokens=["<think>"]), byte_tokenizer(extra_tokens=["<tool>"])
    with pytest.raises(VocabularyError, match=r"so no answer could end\. Give the student the teacher's tokenizer"):
        check(*tokenizers, student_eos=ends[0], teacher_eos=ends[1])


def test_a_renamed_end_is_refused_too_where_nobody_says_at_which_ids_the_models_stop():
    first, second = byte_tokenizer(extra_tokens=["<a>"]), byte_tokenizer(extra_tokens=["<b>"])
    assert check(first, second).size == 258
    first.eos_token = "<a>"
    with pytest.raises(VocabularyError, match="All ends of student 'small' are among them"):
        check(first, second)


def with_added(text: str, *, special: bool, also: str = "<a>"):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=special), AddedToken(also, special=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("names", "special", "taken"),
    [
        (("<think>", "<tool>"), (True, True), True),
        (("<think>", "<tool>"), (False, True), False),
        (("<think>", "<tool>"), (True, False), False),
        (("<think>", "<tool>"), (False, False), False),
        (("<unused7>", "<reserved_3>"), (False, False), True),
        (("<unused7>", "<think>"), (False, True), True),
        (("<unused7>", "<think>"), (False, False), False),
    ],
)
def test_a_differing_added_token_is_masked_only_where_it_is_special_or_reserved_to_both(names, special, taken):
    student, teacher = (with_added(name, special=one) for name, one in zip(names, special, strict=True))
    if taken:
        assert check(student, teacher).invalid_ids == (258,)
        return
    with pytest.raises(VocabularyError) as error:
        check(student, teacher)
    message = str(error.value)
    assert "share every token of text and spell 1 added token differently." in message
    assert (
        f"Text can hold those that are not special to both: 258 is {names[0]!r} to the student and {names[1]!r} to the teacher"
        in message
    )
    assert "copy tokenizer.json and tokenizer_config.json of the teacher" in message


def test_an_ordinary_added_token_is_named_beside_the_special_ones_that_differ_too():
    with pytest.raises(VocabularyError, match="spell 2 added tokens differently") as error:
        check(with_added("<think>", special=False, also="<c>"), with_added("<tool>", special=False, also="<d>"))
    assert "<c>" not in str(error.value)


def test_tokens_of_the_student_alone_are_refused():
    with pytest.raises(
        VocabularyError, match=r"student 'small' has 1 token that teacher 'big' lacks: 258 '<think>'\. .*cannot score"
    ):
        check(byte_tokenizer(extra_tokens=["<think>"]), byte_tokenizer())


def test_tokens_of_the_student_alone_are_refused_even_when_the_teacher_has_padding_rows_there():
    with pytest.raises(VocabularyError, match="258 '<think>'"):
        check(byte_tokenizer(extra_tokens=["<think>"]), byte_tokenizer(), 512, 512)


def test_tokens_of_the_teacher_alone_are_masked_and_named_in_a_warning():
    match = check(byte_tokenizer(), byte_tokenizer(extra_tokens=["<think>", "</think>"]))
    assert match.size == 258
    assert match.invalid_ids == ()
    (warning,) = match.warnings
    assert "teacher 'big' has 2 tokens that student 'small' lacks: 258 '<think>', 259 '</think>'" in warning
    assert "masked" in warning


def test_ids_without_a_token_are_listed_as_invalid():
    tokens = {"a": 0, "b": 1, "c": 4}
    assert check(word_tokenizer(tokens), word_tokenizer(tokens)) == VocabularyMatch(size=5, invalid_ids=(2, 3))


def test_a_teacher_token_in_a_hole_of_the_student_is_invalid_and_warned_about():
    match = check(word_tokenizer({"a": 0, "c": 2}), word_tokenizer({"a": 0, "b": 1, "c": 2}))
    assert (match.size, match.invalid_ids) == (3, (1,))
    assert "1 'b'" in match.warnings[0]


@pytest.mark.parametrize(
    ("rows", "label"), [({"student_rows": 11}, "student 'small'"), ({"teacher_rows": 11}, "teacher 'big'")]
)
def test_a_model_with_fewer_rows_than_tokens_is_refused(rows, label):
    with pytest.raises(VocabularyError) as error:
        check(digit_tokenizer(), digit_tokenizer(), **rows)
    message = str(error.value)
    assert (
        f"{label} has 11 vocabulary rows, but its tokenizer has 2 tokens beyond them: 11 '<pad>', 12 '<eos>'" in message
    )
    assert "resize_token_embeddings(13)" in message


def test_an_unused_added_token_without_a_row_is_left_out_with_a_warning():
    student, teacher = byte_tokenizer(extra_tokens=["<image>"]), byte_tokenizer(extra_tokens=["<image>"])
    match = check(student, teacher, student_rows=258, teacher_rows=320)
    assert match.size == 258
    assert "student 'small' has 258 vocabulary rows, and no row for 1 token" in match.warnings[0]
    assert "258 '<image>'" in match.warnings[0] and len(match.warnings) == 1  # named once


def test_a_padding_token_added_without_resizing_is_refused():
    student = byte_tokenizer()
    student.add_special_tokens({"pad_token": AddedToken("[PAD]", special=True)})
    with pytest.raises(VocabularyError, match=r"258 '\[PAD\]'"):
        check(student, student, student_rows=258, teacher_rows=320)


def test_equal_stop_tokens_raise_no_warning_in_any_order():
    assert check(byte_tokenizer(), byte_tokenizer(), student_eos=[257, 10], teacher_eos=(10, 257)).warnings == ()


def test_a_stop_token_of_the_teacher_alone_is_warned_about_with_its_name():
    (warning,) = check(byte_tokenizer(), byte_tokenizer(), student_eos=[257], teacher_eos=[256, 257]).warnings
    assert "student 'small' stops at 257 '<eos>', teacher 'big' at 256 '<pad>', 257 '<eos>'" in warning
    assert "generation_config.json" in warning


def test_a_stop_token_of_the_student_alone_is_warned_about():
    (warning,) = check(byte_tokenizer(), byte_tokenizer(), student_eos=[256, 257], teacher_eos=[257]).warnings
    assert "may never end a response" in warning


def test_a_teacher_that_stops_only_at_tokens_the_student_lacks_is_refused():
    teacher = byte_tokenizer(extra_tokens=["<|im_end|>"])
    with pytest.raises(VocabularyError, match=r"258 '<\|im_end\|>'\. None of the teacher's stop tokens"):
        check(byte_tokenizer(), teacher, student_eos=[257], teacher_eos=[258])


def test_an_empty_tokenizer_is_refused():
    with pytest.raises(VocabularyError, match="tokenizer of student 'small' has no tokens"):
        check(word_tokenizer({}), digit_tokenizer(), student_rows=3)


@pytest.mark.serial
def test_vocabularies_of_150_000_tokens_are_compared_in_seconds():
    tokens = {f"token{i}": i for i in range(150_000)}
    student, teacher = word_tokenizer(tokens), word_tokenizer({**tokens, "extra": 150_000})
    start = time.perf_counter()
    match = check(student, teacher, 151_936, 152_064)
    assert time.perf_counter() - start < 5
    assert match.size == 150_000
