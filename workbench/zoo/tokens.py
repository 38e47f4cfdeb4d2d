"""A CLIP tokenizer for the shapes world: each of its words is one token, and any other text is bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from transformers import CLIPTokenizer

from workbench.zoo.language import WORDS

LENGTH = 24
"""Tokens a prompt is padded or cut to; the longest prompt of the shapes world has 21."""

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer.

    The vocabulary is CLIP's in small: the 256 bytes, the same as the last of a word, what merging the
    words of the shapes world takes, and the two special tokens. No text is unknown to it.
    """
    alphabet = _byte_characters()
    merges = learn_merges(WORDS)
    tokens = [*alphabet, *(character + _WORD_END for character in alphabet)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [_START, _END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(merges),
        model_max_length=LENGTH,
    )


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one token (Sennrich et al., 2016).

    Args:
        words: lower-case ASCII words.

    Returns:
        The pairs to merge, first merge first.
    """
    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in spelled):
        counts = Counter(pair for parts in spelled for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(parts, best) for parts in spelled]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_characters() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (GPT-2's ``bytes_to_unicode``)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
