import pytest

from workbench.zoo.language import WORDS
from workbench.zoo.tokens import LENGTH, build_tokenizer, learn_merges


@pytest.fixture(scope="module", params=["built", "saved and opened"])
def tokenizer(request, tmp_path_factory):
    built = build_tokenizer()
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    return type(built).from_pretrained(folder)


@pytest.mark.parametrize("word", WORDS)
def test_each_word_of_the_world_is_one_token_of_its_own(tokenizer, word):
    start, token, end = tokenizer(word).input_ids
    assert tokenizer.convert_ids_to_tokens(token) == word + "</w>"
    assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_a_word_keeps_its_token_whatever_stands_beside_it(tokenizer):
    prompt = "a large red circle on the left, and a small Blue square"
    tokens = tokenizer.tokenize(prompt)
    assert tokens == [part + "</w>" for part in prompt.lower().replace(",", " ,").split()]


@pytest.mark.parametrize("text", ["", "Zürich, 円 & 🟥!", "a\n\"quoted\" 'prompt'", "x" * 300])
def test_any_text_becomes_known_tokens_and_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert all(0 <= token < len(tokenizer) for token in ids)
    letters = "".join(text.lower().split())
    assert "".join(tokenizer.decode(ids, skip_special_tokens=True).split()) == letters


def test_prompts_are_padded_and_cut_to_the_length(tokenizer):
    for prompt in ("a red circle", "a red circle " * 20):
        ids = tokenizer(prompt, padding="max_length", truncation=True).input_ids
        assert len(ids) == LENGTH == tokenizer.model_max_length


def test_merges_end_in_whole_words():
    merges = learn_merges(["an", "and", "a"])
    assert {"".join(pair) for pair in merges} >= {"an</w>", "and</w>"}
    assert learn_merges(["a"]) == []
