"""From the token ids an encoder was given to the words a person wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench.errors import UnknownNameError, nearest


@dataclass(frozen=True)
class Word:
    """A word of the prompt and where its tokens stand in the text that attention sees.

    Attributes:
        text: the word, its pieces joined.
        columns: its tokens' positions along the text axis.
        special: whether it is a start, end or padding token.
    """

    text: str
    columns: tuple[int, ...]
    special: bool = False


@dataclass(frozen=True)
class Reading:
    """What one text encoder was given: its ids ``(tokens,)`` and the tokenizer that made them."""

    ids: tuple[int, ...]
    tokenizer: Any


def words_of(readings: Sequence[Reading], length: int) -> list[Word]:
    """Return the words along a text axis of ``length``.

    A pipeline may lay the tokens of several encoders after each other (SD3), use one of several
    (Flux) or lay them over each other (SDXL). The shortest run of consecutive encoders whose lengths
    add up to ``length`` is taken, of several the last: what comes first is the pooled one.

    Args:
        readings: what each encoder was given, in the order of the calls.
        length: tokens along the text axis.

    Returns:
        The words in order; tokens nobody can account for are special words ``"·"``.
    """
    for chosen in _choices(readings):
        if sum(len(each.ids) for each in chosen) == length:
            words, offset = [], 0
            for reading in chosen:
                words += _words(reading, offset)
                offset += len(reading.ids)
            return words
    return [Word("·", (column,), special=True) for column in range(length)]


def find(words: Sequence[Word], text: str | int) -> Word:
    """Return a word by its text or its place.

    Raises:
        UnknownNameError: no such word; the message lists those there are.
    """
    if isinstance(text, int) and -len(words) <= text < len(words):
        return words[text]
    for word in words:
        if not word.special and word.text.lower() == str(text).lower().strip():
            return word
    known = [word.text for word in words if not word.special]
    raise UnknownNameError(f"The prompt has no word {text!r}.{nearest(str(text), known)}")


def reading(ids: torch.Tensor, tokenizer: Any) -> Reading:
    """Return the reading of the first row of ``ids``, ``(batch, tokens)``."""
    return Reading(tuple(int(each) for each in ids[0]), tokenizer)


def _choices(readings: Sequence[Reading]) -> list[list[Reading]]:
    distinct: list[Reading] = []
    for each in readings:
        if each.ids not in [other.ids for other in distinct]:
            distinct.append(each)
    runs = [
        distinct[start : start + count]
        for count in range(1, len(distinct) + 1)
        for start in reversed(range(len(distinct) - count + 1))
    ]
    first_and_last = [[distinct[0], distinct[-1]]] if len(distinct) > 2 else []
    return runs + first_and_last


def _words(each: Reading, offset: int) -> list[Word]:
    pieces = each.tokenizer.convert_ids_to_tokens(list(each.ids))
    specials = set(each.tokenizer.all_special_ids)
    ended, words = False, list[Word]()
    joins = False
    for column, (token, piece) in enumerate(zip(each.ids, pieces, strict=True)):
        piece = str(piece)
        special = token in specials
        if special:
            # Past the end token everything is padding, even where both are the same token.
            label = "padding" if ended else ("start" if column == 0 else "end")
            ended = ended or label == "end"
            words.append(Word(label, (offset + column,), special=True))
            joins = False
            continue
        text, starts, joins_next = _piece(piece, joins)
        if not starts and words and not words[-1].special:
            last = words[-1]
            words[-1] = Word(last.text + text, (*last.columns, offset + column))
        else:
            words.append(Word(text, (offset + column,)))
        joins = joins_next
    return words


def _piece(piece: str, joins: bool) -> tuple[str, bool, bool]:
    """Return a piece's text, whether it starts a word, and whether the next piece goes on with it."""
    if piece.endswith("</w>"):
        return piece.removesuffix("</w>"), not joins, False
    if piece.startswith(("▁", "Ġ")):
        return piece[1:], True, True
    return piece, not joins, True
