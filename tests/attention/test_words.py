"""From token ids back to the words of the prompt."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from workbench.attention.request import Attention
from workbench.attention.words import Reading, Word, closest, find, located, reading, tokenize, words_of
from workbench.errors import InputError, UnknownNameError
from workbench.models.model import DiffusionModel

PROMPT = "A red Circle, left of a red square"


def clip(prompt):
    tokenizer = tiny.clip_tokenizer()
    return reading(tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids[0], tokenizer)


def t5(prompt, length=24):
    tokenizer = tiny.t5_tokenizer()
    made = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
    return reading(made.input_ids[0], tokenizer)


def test_clip_words_start_and_end_and_padding():
    words = words_of([clip("a red circle")], 24)
    assert [word.text for word in words] == ["start", "a", "red", "circle", "end", *["padding"] * 19]
    assert [word.special for word in words] == [True, False, False, False, True, *[True] * 19]
    assert [word.columns for word in words] == [(column,) for column in range(24)]


def test_clip_pieces_are_joined():
    words = words_of([clip("a zebra left")], 24)
    assert [word.text for word in words if not word.special] == ["a", "zebra", "left"]
    zebra = find(words, "zebra")
    assert zebra.columns == tuple(range(2, 2 + len(zebra.columns)))
    assert len(zebra.columns) > 1
    assert find(words, "left").columns == (2 + len(zebra.columns),)


def test_t5_pieces_are_joined():
    words = words_of([t5("a zebra left")], 24)
    assert [word.text for word in words[:4]] == ["a", "zebra", "left", "end"]
    assert len(words[1].columns) > 1
    assert words[2].columns == (words[1].columns[-1] + 1,)
    assert {word.text for word in words[4:]} == {"padding"}


def test_every_column_belongs_to_one_word():
    for prompt in ("a red circle", "zebra, zebra!", "a"):
        for made in (clip(prompt), t5(prompt)):
            columns = [column for word in words_of([made], 24) for column in word.columns]
            assert columns == list(range(24))


def test_what_stands_for_an_unknown_word_is_neither_start_nor_end():
    words = [word for word in words_of([t5("☃ circle ☃")], 24) if word.text]
    assert [word.text for word in words[:5]] == ["<unk>", "circle", "<unk>", "end", "padding"]
    assert [word.special for word in words[:5]] == [True, False, True, True, True]


def test_two_encoders_after_each_other():
    words = words_of([clip("a red circle"), clip("a red circle"), t5("a red circle")], 48)
    assert [word.columns for word in words if word.text == "red"] == [(2,), (25,)]
    assert find(words, "red").columns == (2,)
    located = words_of([clip(PROMPT), clip(PROMPT), t5(PROMPT)], 48, PROMPT)
    of_t5 = find(words_of([t5(PROMPT)], 24, PROMPT), "red").columns[0]
    assert find(located, "red").columns == find(located, (2, 5)).columns == (2, 24 + of_t5)
    assert find(located, "red circle").text == "red circle"
    assert set(find(located, "red circle").columns) > {2, 3, 24 + of_t5}
    assert find(located, 2).columns == (2,)


def test_one_of_two_encoders_by_its_length():
    words = words_of([clip("a red circle"), t5("a red circle", 16)], 16)
    assert find(words, "red").columns == (1,)
    assert len(words) == 16


def test_text_nobody_accounts_for_is_special():
    words = words_of([clip("a red circle")], 7)
    assert words == [Word("·", (column,), special=True) for column in range(7)]


def test_word_by_place_or_by_text_in_any_case():
    words = words_of([clip("a red circle")], 24)
    assert find(words, 2) == find(words, "Red") == find(words, " red ") == Word("red", (2,))
    assert find(words, -1).text == "padding"


def test_unknown_word_names_the_nearest():
    words = words_of([clip("a red circle")], 24)
    with pytest.raises(UnknownNameError, match="Did you mean 'circle'"):
        find(words, "sircle")
    with pytest.raises(UnknownNameError, match="There are: 'a', 'red', 'circle'"):
        find(words, "xylophone")
    with pytest.raises(UnknownNameError):
        find(words, "start")
    with pytest.raises(UnknownNameError):
        find(words, 24)


def test_reading_is_plain_numbers():
    made = reading(torch.tensor([1, 2]), None)
    assert made == Reading((1, 2), None)


@pytest.mark.parametrize(
    ("name", "columns"), [("sd1", [(2,)]), ("sd3", [(2,), (25,)]), ("flux", [(1,)]), ("pixart", [(1,)])]
)
def test_pipelines_words_stand_where_their_encoders_put_them(name, columns):
    case = tiny.CASES[name]
    arguments = {**case.arguments, "num_inference_steps": 1}
    record = DiffusionModel(case.build()).record(**arguments, capture=[Attention()])
    words = record.attention.words
    assert [word.columns for word in words if word.text == "red"] == columns
    assert sum(len(word.columns) for word in words) == next(iter(record.attention.layers.values())).shape[1]


def test_a_word_goes_without_the_punctuation_after_it():
    for made in (clip(PROMPT), t5(PROMPT)):
        words = words_of([made], 24, PROMPT)
        circle = find(words, "circle")
        assert PROMPT[slice(*circle.span)] == "Circle"
        assert find(words, "circle,") == circle
        assert find(words, ",").columns == (circle.columns[-1] + 1,)


def test_an_encoder_that_reads_other_texts_first_or_too_is_told_by_the_prompt():
    tokenizer = tiny.clip_tokenizer()
    rows = [
        *tokenizer(["", "a blue square", "a red circle"], padding="max_length", return_tensors="pt").input_ids
    ]
    assert closest(rows, tokenizer, "a red circle") is rows[2]
    assert closest(rows, tokenizer, "a blue square") is rows[1]
    assert closest(rows[1:], tokenizer, "a red") is rows[2]


def test_part_of_what_an_encoder_reads_is_told_by_the_prompt():
    tokenizer = tiny.t5_tokenizer()
    prompt = "a red circle"
    template = "left of a blue square "
    padded = tokenizer(template + prompt, padding="max_length", max_length=24, return_tensors="pt").input_ids[
        0
    ]
    whole = tokenizer(template + prompt).input_ids
    told = reading(padded, tokenizer)
    assert find(words_of([told], len(whole), prompt), "red").columns == (len(whole) - 3,)
    behind = tokenizer(template, add_special_tokens=False).input_ids
    assert find(words_of([told], 24 - len(behind), prompt), "red").columns == (1,)
    assert words_of([told], 24 - len(whole), prompt)[0].text == "·"
    assert words_of([told], 24 - len(behind), "a green star")[0].text == "·"


def test_phrases_and_characters_are_words_too():
    words = words_of([clip(PROMPT)], 24, PROMPT)
    for word in words:
        assert word.special or PROMPT[slice(*word.span)].lower() == word.text
    assert find(words, "red circle").text == "red circle"
    assert find(words, "red circle").columns == (*find(words, "red").columns, *find(words, "circle").columns)
    assert find(words, "a red square").columns[0] > find(words, "left").columns[0]
    second = PROMPT.rindex("red")
    assert find(words, (second, second + 3)).columns != find(words, "red").columns
    assert find(words, (second, second + 3)).text == "red"
    assert find(words, (3, 8)).text == "red circle"
    for asked in ("circle red", (100, 120), "", (1, 1)):
        with pytest.raises(UnknownNameError, match="The prompt has no word"):
            find(words, asked)


def test_words_are_found_one_after_the_other():
    words = [Word("a", (0,)), Word("a", (1,)), Word("lost", (2,)), Word("end", (3,), special=True)]
    assert [word.span for word in located(words, "a man, a plan")] == [(0, 1), (3, 4), None, None]


def test_a_prompt_as_each_tokenizer_reads_it():
    model = DiffusionModel(tiny.sd3())
    found = model.words("a zebra left")
    assert list(found) == ["tokenizer", "tokenizer_2", "tokenizer_3"]
    for tokens in found.values():
        assert len(tokens.ids) == len(tokens.pieces) == tokens.limit
        at = tokens.of("zebra")
        assert tokens.word_at(at[-1]).text == "zebra"
        assert tokens.cut == ""
        assert "zebra" in str(tokens)
        assert "padding" in str(tokens)
        with pytest.raises(InputError, match="counted from 0"):
            tokens.word_at(10_000)
    assert len(model.words("a zebra", max_sequence_length=7)["tokenizer_3"].ids) == 7


@pytest.mark.parametrize("make", [tiny.clip_tokenizer, tiny.t5_tokenizer])
def test_what_is_not_read_is_told(make):
    prompt = "a red circle left of a blue square"
    short = tokenize(make(), prompt, 6)
    assert len(short.ids) == 6
    assert prompt.endswith(short.cut)
    read = prompt.removesuffix(short.cut).split()
    assert [word.text for word in short.words if not word.special][: len(read)] == read
    assert "not read" in str(short)
    assert tokenize(make(), "a red circle").cut == ""


def test_a_prompt_is_padded_to_what_the_pipeline_was_asked_for():
    model = DiffusionModel(tiny.sd3())
    read = model.words("a red circle", max_sequence_length=40)
    assert [len(each.ids) for each in read.values()] == [24, 24, 40]
    seen = model.record(
        "a red circle", seed=0, num_inference_steps=1, max_sequence_length=40, capture=[Attention()]
    )
    assert sum(len(word.columns) for word in seen.attention.words) == 24 + 40
    assert read["tokenizer_3"].of("circle") == (2,)


def test_what_has_no_words_says_so():
    with pytest.raises(InputError, match="no tokenizer"):
        DiffusionModel(tiny.ddpm()).words("a red circle")
    with pytest.raises(InputError, match="one prompt"):
        DiffusionModel(tiny.sd1()).words(["a", "b"])
