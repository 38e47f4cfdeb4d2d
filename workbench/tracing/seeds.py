"""Seeds: noise that is the same everywhere and paired between runs."""

from __future__ import annotations

from collections.abc import Sequence

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
    if seed is None:
        return None
    seeds = [seed + image for _ in range(prompts) for image in range(images)] if _is_int(seed) else list(seed)  # type: ignore[operator, arg-type]
    if not all(_is_int(each) for each in seeds):
        raise InputError(f"seed={seed!r} is not a whole number or a list of them.")
    if len(seeds) != prompts * images:
        raise InputError(
            f"{len(seeds)} seeds for {prompts * images} samples; give one, or one for each sample."
        )
    made = [torch.Generator("cpu").manual_seed(each) for each in seeds]
    return made[0] if len(made) == 1 else made


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
