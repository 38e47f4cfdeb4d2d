"""Seeds: noise that is the same everywhere and paired between runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from workbench.errors import InputError

Seed = int | Sequence[int] | None


def generators(seed: Seed, *, prompts: int, images: int) -> torch.Generator | list[torch.Generator] | None:
    """Return the generators for a batch, one a sample, always on the CPU.

    With one seed, every prompt gets the same noise, and its n-th image that of ``seed + n``: the
    default pairs prompts and varies images.

    Args:
        seed: one seed, or one a sample; None gives None.
        prompts: how many prompts the batch has.
        images: how many images a prompt.

    Raises:
        InputError: seeds that are no integers, or not one a sample.
    """
    given = normal(seed)
    if given is None:
        return None
    if isinstance(given, int):
        seeds = [given + image for _ in range(prompts) for image in range(images)]
    else:
        seeds = list(given)
    if len(seeds) != prompts * images:
        raise InputError(
            f"{len(seeds)} seeds for {prompts * images} samples; give one, or one for each sample."
        )
    made = [torch.Generator("cpu").manual_seed(each) for each in seeds]
    return made[0] if len(made) == 1 else made


def single(seed: Seed) -> torch.Generator:
    """Return the one generator that a loop written by hand draws all its noise from.

    Raises:
        InputError: several seeds: which noise is whose is the loop's own affair.
    """
    given = normal(seed)
    if not isinstance(given, int):
        raise InputError(f"A loop of your own draws its noise from one seed, not from {seed!r}.")
    return torch.Generator("cpu").manual_seed(given)


def set_apart(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's arguments with copies of the generators as they are now: a run advances its own.

    What is one generator for several samples is one in the copy too.
    """
    made: dict[int, torch.Generator] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(each, torch.Generator) for each in value):
            return type(value)(copy(each) for each in value)
        if not isinstance(value, torch.Generator):
            return value
        if id(value) not in made:
            made[id(value)] = torch.Generator(value.device)
            made[id(value)].set_state(value.get_state())
        return made[id(value)]

    return {name: copy(value) for name, value in arguments.items()}


def normal(seed: Seed) -> int | tuple[int, ...] | None:
    """Return a seed as a plain integer, or seeds as a tuple of them.

    Raises:
        InputError: something that is neither, or a number that does not fit 63 bits.
    """
    if seed is None:
        return None
    try:
        return tuple(_whole(each) for each in seed) if isinstance(seed, Sequence) else _whole(seed)
    except TypeError:
        raise InputError(f"seed={seed!r} is not a whole number or a list of them.") from None


def _whole(seed: Any) -> int:
    number = operator.index(seed)
    if isinstance(seed, bool):
        raise TypeError
    if not -(2**63) <= number < 2**63:
        raise InputError(f"seed={seed!r} is too large; a generator takes 63 bits.")
    return number
