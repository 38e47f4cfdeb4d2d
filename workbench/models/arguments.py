"""The pipeline's own arguments, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from workbench.errors import InputError, UnknownNameError, nearest

_LEGACY = ("callback", "callback_steps", "prior_callback", "prior_callback_steps")


def check(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments the pipeline does not take, and prompts it cannot use.

    Raises:
        UnknownNameError: an argument the pipeline does not have.
        InputError: an empty prompt, or one that is no text; steps that are no positive number.
    """
    parameters = inspect.signature(pipeline).parameters
    known = {
        name: each for name, each in parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD
    }
    if len(known) == len(parameters) or not _takes_others(pipeline):
        for name in arguments:
            if name not in known and name not in _LEGACY:
                raise UnknownNameError(f"{type(pipeline).__name__} takes no {name!r}.{nearest(name, known)}")
    _check_prompt(pipeline, arguments, known)
    steps = arguments.get("num_inference_steps")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise InputError(f"num_inference_steps={steps!r} is not a whole number of at least 1.")


def takes(pipeline: Any, name: str) -> bool:
    """Whether a pipeline, or a loop, has an argument of this name."""
    return name in inspect.signature(pipeline).parameters


def count_prompts(arguments: Mapping[str, Any]) -> int:
    """Return how many prompts a call has; without words, how many classes, embeddings or pictures."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    if isinstance(arguments.get("class_labels"), (list, tuple)):
        return len(arguments["class_labels"])
    if prompt is None:
        named = ("prompt_embeds", "image_embeds", "image")
        embeds, pictures, image = (cast("Any", arguments.get(each)) for each in named)
        if embeds is not None:
            return len(embeds)
        if pictures is not None:
            return sum(map(len, pictures)) if isinstance(pictures, (list, tuple)) else len(pictures)
        if isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) >= 4:
            return len(image)
    return int(arguments.get("batch_size", 1))


def count_images(arguments: Mapping[str, Any]) -> int:
    """Return how many samples each prompt of a call gets."""
    return int(
        arguments.get("num_images_per_prompt")
        or arguments.get("num_videos_per_prompt")
        or arguments.get("num_waveforms_per_prompt")
        or 1
    )


def _takes_others(pipeline: Any) -> bool:
    """Whether names that go into a call's ``**kwargs`` may mean something.

    The pipelines of diffusers that end in ``**kwargs`` take `_LEGACY` there and drop all else without a
    word, so that a misspelt argument would go unnoticed.
    """
    return not inspect.unwrap(type(pipeline).__call__).__module__.startswith("diffusers.pipelines.")


def _check_prompt(
    pipeline: Any, arguments: Mapping[str, Any], known: Mapping[str, inspect.Parameter]
) -> None:
    if arguments.get("prompt") is None:
        needs_words = {"prompt", "prompt_embeds"} <= set(known) and "image" not in known
        if needs_words and arguments.get("prompt_embeds") is None:
            raise InputError(f"{type(pipeline).__name__} needs a prompt, such as 'a red circle'.")
        return
    prompts = arguments["prompt"]
    for prompt in prompts if isinstance(prompts, (list, tuple)) else [prompts]:
        if not isinstance(prompt, str):
            raise InputError(f"A prompt is text; this is {type(prompt).__name__}: {prompt!r}")
        if not prompt.strip():
            raise InputError("The prompt is empty. Write what the image should show, such as 'a red circle'.")
        _check_length(pipeline, prompt, _longest_read(arguments, known))


def _longest_read(arguments: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> int | None:
    """Return how many tokens the call lets the longest-reading encoder have, where it says so."""
    name = "max_sequence_length"
    length = arguments.get(name, known[name].default if name in known else None)
    return length if isinstance(length, int) else None


def _check_length(pipeline: Any, prompt: str, most: int | None) -> None:
    """Refuse what the longest-reading encoder would cut off: a silently shortened prompt misleads."""
    readers = [
        each for each in pipeline.components.values() if hasattr(each, "model_max_length") and callable(each)
    ]
    limits = [limit for each in readers if 0 < (limit := each.model_max_length) < 100_000]
    if not readers or len(limits) < len(readers):
        return
    reader = max(readers, key=lambda each: each.model_max_length)
    limit = min(reader.model_max_length, most or reader.model_max_length)
    ids = reader(prompt, truncation=False, add_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) > limit:
        kept = reader.decode(ids[:limit], skip_special_tokens=True)
        raise InputError(
            f"The prompt has {len(ids)} tokens; the model reads {limit}. It would stop "
            f"after {kept[-60:]!r}. Shorten it."
        )
