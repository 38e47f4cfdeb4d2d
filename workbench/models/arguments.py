"""The pipeline's own arguments, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from workbench.errors import InputError, UnknownNameError, nearest


def check(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments the pipeline does not take, and prompts it cannot use.

    Raises:
        UnknownNameError: an argument the pipeline does not have.
        InputError: an empty prompt, or one that is no text; steps that are no positive number.
    """
    known = inspect.signature(pipeline.__call__).parameters
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        for name in arguments:
            if name not in known:
                raise UnknownNameError(f"{type(pipeline).__name__} takes no {name!r}.{nearest(name, known)}")
    _check_prompt(pipeline, arguments)
    steps = arguments.get("num_inference_steps")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise InputError(f"num_inference_steps={steps!r} is not a whole number of at least 1.")


def count_prompts(arguments: Mapping[str, Any]) -> int:
    """Return how many prompts a call has."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    embeds = arguments.get("prompt_embeds")
    if prompt is None and embeds is not None:
        return int(embeds.shape[0])
    return int(arguments.get("batch_size", 1))


def count_images(arguments: Mapping[str, Any]) -> int:
    """Return how many samples each prompt of a call gets."""
    return int(
        arguments.get("num_images_per_prompt")
        or arguments.get("num_videos_per_prompt")
        or arguments.get("num_waveforms_per_prompt")
        or 1
    )


def _check_prompt(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    if arguments.get("prompt") is None:
        return
    prompts = arguments["prompt"]
    for prompt in prompts if isinstance(prompts, (list, tuple)) else [prompts]:
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is text; this is {type(prompt).__name__}: {prompt!r}")
        if not prompt.strip():
            raise InputError("The prompt is empty. Write what the image should show, such as 'a red circle'.")
        _check_length(pipeline, prompt)


def _check_length(pipeline: Any, prompt: str) -> None:
    """Refuse what the longest-reading encoder would cut off: a silently shortened prompt misleads."""
    readers = [
        each for each in pipeline.components.values() if hasattr(each, "model_max_length") and callable(each)
    ]
    limits = [limit for each in readers if 0 < (limit := each.model_max_length) < 100_000]
    if not readers or len(limits) < len(readers):
        return
    reader = max(readers, key=lambda each: each.model_max_length)
    ids = reader(prompt, truncation=False, add_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) > reader.model_max_length:
        kept = reader.decode(ids[: reader.model_max_length], skip_special_tokens=True)
        raise InputError(
            f"The prompt has {len(ids)} tokens; the model reads {reader.model_max_length}. It would stop "
            f"after {kept[-60:]!r}. Shorten it."
        )
