"""From the token ids an encoder was given to the words a person wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import punctuation
from typing import Any

import torch

from workbench.errors import InputError, UnknownNameError, nearest

_STOPS = (",", ".", ";", ":", "!", "?", ")")
"""Punctuation that is a word by itself."""

UNKNOWN = "·"
"""The text of a place that no encoder's tokens account for."""

_LONGEST = 512
"""Tokens that a prompt is padded to by tokenizers that set no limit."""


@dataclass(frozen=True)
class Word:
    """A word of the prompt and where its tokens stand in the text that attention sees.

    Attributes:
        text: the word, its pieces joined.
        columns: its tokens' positions along the text axis.
        special: whether it is a start, end or padding token.
        span: its first character of the prompt and the one after its last; None where that is not known.
    """

    text: str
    columns: tuple[int, ...]
    special: bool = False
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Reading:
    """What one text encoder was given: its ids ``(tokens,)`` and the tokenizer that made them."""

    ids: tuple[int, ...]
    tokenizer: Any


def words_of(readings: Sequence[Reading], length: int, prompt: str = "") -> list[Word]:
    """Return the words along a text axis of ``length``.

    A pipeline may lay the tokens of several encoders after each other (SD3), use one of several
    (Flux) or lay them over each other (SDXL). The shortest run of consecutive encoders whose lengths
    add up to ``length`` is taken, of several the last: what comes first is the pooled one. Or it may leave
    out the padding, or what a template says before the prompt (Qwen-Image).

    Args:
        readings: what each encoder was given, in the order of the calls.
        length: tokens along the text axis.
        prompt: what the person wrote, to tell where in it each word stands.

    Returns:
        The words in order; tokens nobody can account for are special words ``"·"``.
    """
    words, offset = list[Word](), 0
    chosen = laid_out(readings, length) or _part(readings, length, prompt)
    if not chosen:
        return [Word(UNKNOWN, (column,), special=True) for column in range(length)]
    for each in chosen:
        words += located(_words(each, offset), prompt)
        offset += len(each.ids)
    return words


def laid_out(readings: Sequence[Reading], length: int) -> list[Reading] | None:
    """Return which encoders' tokens lie along a text axis, in order; None where nobody can tell."""
    return next(
        (chosen for chosen in _choices(readings) if sum(len(each.ids) for each in chosen) == length), None
    )


def _part(readings: Sequence[Reading], length: int, prompt: str) -> list[Reading]:
    """Return the part of one encoder's tokens that lies along the axis, if the whole prompt is in it."""
    wanted = "".join(prompt.lower().split())
    for each in reversed(readings) if wanted else ():
        padding = getattr(each.tokenizer, "pad_token_id", None)
        valid = tuple(token for token in each.ids if token != padding)
        for ids in (valid, each.ids[-length:]):
            part = Reading(ids, each.tokenizer)
            if len(ids) == length and wanted in "".join(word.text.lower() for word in _words(part, 0)):
                return [part]
    return []


def closest(rows: Sequence[torch.Tensor], tokenizer: Any, prompt: str) -> torch.Tensor:
    """Return which of an encoder's ``rows`` of ids is a prompt's, ``(tokens,)``; of several the first.

    An encoder may be given what is not wanted first, or both at once.
    """
    wanted = Counter(tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def likeness(row: torch.Tensor) -> float:
        found = Counter(each for each in row.tolist() if each not in tokenizer.all_special_ids)
        return 2 * (found & wanted).total() / max(found.total() + wanted.total(), 1)

    return max(rows, key=likeness)


def silent(rows: Sequence[torch.Tensor], tokenizer: Any) -> torch.Tensor | None:
    """Return which of an encoder's ``rows`` of ids is that of an empty prompt, ``(tokens,)``, if one is."""
    specials = set(tokenizer.all_special_ids)
    return next((row for row in rows if specials.issuperset(row.tolist())), None)


def find(words: Sequence[Word], asked: str | int | tuple[int, int]) -> Word:
    """Return a word, or several as one.

    Args:
        words: of the prompt.
        asked: a word, a phrase of words that follow each other (of several such the first), a place in
            ``words``, or the first and the end of a stretch of the prompt's characters, of which every word
            that it touches is meant. A word of the prompt is found in every encoder's text.

    Raises:
        UnknownNameError: no such word; the message lists those there are.
    """
    if isinstance(asked, int) and -len(words) <= asked < len(words):
        return words[asked]
    plain = [word for word in words if not word.special]
    found: list[Word] = []
    if isinstance(asked, tuple):
        found = _touched(plain, *asked)
    else:
        wanted = [_bare(each) for each in str(asked).split()]
        for start in range(len(plain) - len(wanted) + 1 if wanted else 0):
            run = plain[start : start + len(wanted)]
            if [_bare(word.text) for word in run] == wanted:
                first, last = run[0].span, run[-1].span
                found = run if first is None or last is None else _touched(plain, first[0], last[1])
                break
        # Of maps that were kept of a phrase, it is one word.
        found = found or [each for each in plain if [_bare(one) for one in each.text.split()] == wanted][:1]
    if found:
        return _as_one(found)
    known = [word.text for word in plain]
    raise UnknownNameError(f"The prompt has no word {asked!r}.{nearest(str(asked), known)}")


def _touched(words: Sequence[Word], start: int, end: int) -> list[Word]:
    return [word for word in words if word.span and word.span[0] < end and start < word.span[1]]


def _bare(text: str) -> str:
    """Return a word without case and without punctuation around it, unless it is nothing else."""
    return text.lower().strip(punctuation) or text.lower()


def located(words: Sequence[Word], prompt: str) -> list[Word]:
    """Return the words with where they stand in the prompt, found one after the other in any case."""
    found, start, lowered = [], 0, prompt.lower()
    for word in words:
        at = -1 if word.special else lowered.find(word.text.lower(), start)
        if at >= 0:
            start = at + len(word.text)
        found.append(word if at < 0 else replace(word, span=(at, start)))
    return found


def _as_one(words: Sequence[Word]) -> Word:
    if len(words) == 1:
        return words[0]
    spans = [word.span for word in words if word.span is not None]
    texts, end = list[str](), 0
    for word in words:
        # Where a later encoder reads the same again, it says nothing new.
        if word.span is None or word.span[0] >= end:
            texts.append(word.text)
            end = word.span[1] if word.span else end
    return Word(
        " ".join(texts),
        tuple(column for word in words for column in word.columns),
        span=(min(start for start, _ in spans), max(end for _, end in spans)) if spans else None,
    )


def reading(ids: torch.Tensor, tokenizer: Any) -> Reading:
    """Return the reading of one prompt's ``ids``, ``(tokens,)``."""
    return Reading(tuple(int(each) for each in ids), tokenizer)


@dataclass(frozen=True)
class Tokens:
    """How one tokenizer reads a prompt.

    Attributes:
        ids: of the tokens, as an encoder is given them.
        pieces: what the tokenizer calls them.
        words: the words and the start, end and padding tokens, with the places of their tokens.
        limit: how many tokens the encoder reads.
        cut: what stands behind that limit and is not read; empty if all is.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    words: tuple[Word, ...]
    limit: int
    cut: str = ""

    def of(self, asked: str | int | tuple[int, int]) -> tuple[int, ...]:
        """Return the places of a word's tokens, or a phrase's, or a stretch of characters' (see `find`)."""
        return find(self.words, asked).columns

    def word_at(self, token: int) -> Word:
        """Return the word that a token belongs to.

        Raises:
            InputError: there is no such token.
        """
        for word in self.words:
            if token in word.columns:
                return word
        raise InputError(f"The prompt has {len(self.ids)} tokens, counted from 0; {token} is none of them.")

    def __str__(self) -> str:
        """Return a line a word: its tokens' places and pieces."""
        shown = [word for word in self.words if word.text != "padding"]
        lines = [
            f"{word.text:<16} {' '.join(f'{at}:{self.pieces[at]}' for at in word.columns)}" for word in shown
        ]
        padding = sum(word.text == "padding" for word in self.words)
        lines += [f"{'padding':<16} {padding} tokens"] if padding else []
        lines += [f"{'not read':<16} {self.cut!r}: the encoder reads {self.limit} tokens"] if self.cut else []
        return "\n".join(lines)


def tokenize(tokenizer: Any, prompt: str, limit: int | None = None) -> Tokens:
    """Return how a tokenizer reads a prompt, padded as diffusers does where it can pad.

    Args:
        tokenizer: one of transformers.
        prompt: what the person wrote.
        limit: how many tokens the encoder is given; None is the tokenizer's own.
    """
    # Pipelines pad to the length they were asked for, whatever a tokenizer calls its longest.
    most = limit or min(tokenizer.model_max_length, _LONGEST)
    padded = {"padding": "max_length"} if tokenizer.pad_token is not None else {}
    ids = tuple(tokenizer(prompt, max_length=most, truncation=True, **padded)["input_ids"])
    whole = tuple(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
    words = located(_words(Reading(ids, tokenizer), 0), prompt)
    cut = ""
    if len(whole) > most:
        every = located(_words(Reading(whole, tokenizer), 0), prompt)
        read = [word for word in words if not word.special]
        # The last word that is read may be there in part.
        missing = [word for word in every if not word.special][len(read) - (not _is_whole(read, every)) :]
        starts = [word.span[0] for word in missing if word.span is not None]
        cut = prompt[starts[0] :] if starts else ""
    pieces = tuple(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
    return Tokens(ids, pieces, tuple(words), most, cut)


def _is_whole(read: Sequence[Word], every: Sequence[Word]) -> bool:
    if not read:
        return True
    same = [word for word in every if not word.special][len(read) - 1]
    return len(same.columns) == len(read[-1].columns)


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
    known = each.tokenizer
    specials = set(known.all_special_ids)
    # What stands for a word that is not known is neither start, end nor padding.
    specials -= {known.unk_token_id} - {known.bos_token_id, known.eos_token_id, known.pad_token_id}
    added = getattr(each.tokenizer, "added_tokens_decoder", {})
    others = ({token for token, how in added.items() if how.special} | {known.unk_token_id}) - specials
    ended, words = False, list[Word]()
    joins = False
    for column, (token, piece) in enumerate(zip(each.ids, pieces, strict=True)):
        piece = str(piece)
        if token in others:
            words.append(Word(piece, (offset + column,), special=True))
            joins = False
            continue
        if token in specials:
            # Past the end token everything is padding, even where both are the same token.
            label = "padding" if ended else ("start" if column == 0 else "end")
            ended = ended or label == "end"
            words.append(Word(label, (offset + column,), special=True))
            joins = False
            continue
        text, starts, joins_next = _piece(piece, joins)
        starts = starts or text in _STOPS
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
    if "Ċ" in piece:
        return piece, True, False
    return piece, not joins, True
