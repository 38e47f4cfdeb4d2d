"""The words of the shapes world: a scene as a prompt, and a prompt as what it asks for.

The grammar is small and regular, one token a word::

    prompt   = thing [joint thing] ["on a" ground "background"]
    thing    = "a" [size] colour shape [place]
    joint    = "and" | "left of" | "right of" | "above" | "below"
    place    = "on the left" | "on the right" | "at the top" | "at the bottom" | "in the middle"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workbench.errors import InputError, UnknownNameError, nearest

if TYPE_CHECKING:
    from workbench.zoo.world import Scene, Thing

COLOURS = ("red", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
GROUNDS = ("light", "dark")
PLACES = ("left", "right", "top", "bottom", "middle")

_PLACE_WORDS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_RELATION_WORDS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

WORDS = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *GROUNDS,
    *PLACES,
    *("a", "and", "the", "on", "at", "in", "of", "above", "below", "background"),
)
"""Every word a prompt of the shapes world can hold."""


@dataclass(frozen=True)
class Wording:
    """Which words a prompt spends on a scene; what is left out is free.

    Attributes:
        sizes: say small or large.
        ground: say light or dark.
        places: ``"none"``, ``"each"`` (after each object) or ``"relation"`` (between two objects).
    """

    sizes: bool = True
    ground: bool = True
    places: str = "none"


@dataclass(frozen=True)
class AskedThing:
    """One object a prompt asks for; ``None`` where the prompt leaves it free."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for."""

    things: tuple[AskedThing, ...]
    ground: str | None = None


def describe(scene: Scene, wording: Wording | None = None) -> str:
    """Put a scene into words.

    Args:
        scene: what is to be said.
        wording: which words to spend; sizes and ground, but no places, if not given.

    Returns:
        A prompt such as ``"a large red circle and a small blue square on a dark background"``.
    """
    wording = wording or Wording()
    phrases = [_phrase(thing, wording) for thing in scene.things]
    joint = "and"
    if wording.places == "relation" and len(scene.things) == 2:
        joint = _RELATION_WORDS[scene.things[0].place]
    prompt = f" {joint} ".join(phrases)
    return f"{prompt} on a {scene.ground} background" if wording.ground else prompt


def _phrase(thing: Thing, wording: Wording) -> str:
    words = [thing.size] if wording.sizes else []
    words = ["a", *words, thing.colour, thing.shape]
    if wording.places == "each":
        words.append(_PLACE_WORDS[thing.place])
    return " ".join(words)


def parse(prompt: str) -> Asked:
    """Read what a prompt of the shapes world asks for.

    Args:
        prompt: a prompt as ``describe`` writes them; case and commas are ignored.

    Returns:
        The objects in the order of the prompt, and the ground if it is named.

    Raises:
        UnknownNameError: if a word is not one of ``WORDS``.
        InputError: if the words make no prompt of this grammar.
    """
    words = prompt.lower().replace(",", " ").split()
    for word in words:
        if word not in WORDS:
            raise UnknownNameError(f"{word!r} is no word of the shapes world.{nearest(word, WORDS)}")
    words, ground = _take_ground(words)
    parts, joint = _split(words, prompt)
    things = [_parse_thing(part, prompt) for part in parts]
    if joint is not None and len(things) == 2:
        things = [replace(things[0], place=joint), replace(things[1], place=_OPPOSITE[joint])]
    return Asked(tuple(things), ground)


def _take_ground(words: list[str]) -> tuple[list[str], str | None]:
    tail = words[-4:]
    if len(tail) == 4 and tail[:2] == ["on", "a"] and tail[2] in GROUNDS and tail[3] == "background":
        return words[:-4], tail[2]
    return words, None


def _split(words: Sequence[str], prompt: str) -> tuple[list[list[str]], str | None]:
    """Cut the words at the joint; returns the parts and the place of the first object, if it is told."""
    for place, phrase in _RELATION_WORDS.items():
        joint = phrase.split()
        for start in range(1, len(words) - len(joint)):
            if list(words[start : start + len(joint)]) == joint:
                return [list(words[:start]), list(words[start + len(joint) :])], place
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            parts.append([])
        else:
            parts[-1].append(word)
    if not all(parts) or len(parts) > 2:
        raise InputError(
            f"{prompt!r} should name one or two objects, as in 'a red circle and a blue square'."
        )
    return parts, None


def _parse_thing(words: list[str], prompt: str) -> AskedThing:
    rest = words[1:] if words[0] == "a" else words
    size = rest[0] if rest and rest[0] in SIZES else None
    rest = rest[1:] if size else rest
    place = None
    if len(rest) > 2:
        place = next((name for name, text in _PLACE_WORDS.items() if text.split() == rest[2:]), None)
        rest = rest[:2] if place else rest
    if len(rest) != 2 or rest[0] not in COLOURS or rest[1] not in SHAPES:
        raise InputError(
            f"{' '.join(words)!r} in {prompt!r} is no object: write [size] colour shape [place], "
            "as in 'a large red circle on the left'."
        )
    return AskedThing(rest[0], rest[1], size, place)
