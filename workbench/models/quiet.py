"""Keeps the libraries' progress bars out of a notebook's cells while we show our own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()

# Some schedulers of diffusers make numpy arrays of torch's tensors at each run, and a notebook would show
# this remark on it in red. It is between those libraries; none of their users can mend it.
warnings.filterwarnings(
    "ignore", message="__array__ implementation doesn't accept a copy keyword", category=DeprecationWarning
)


@contextmanager
def quiet_run(pipeline: Any) -> Iterator[None]:
    """Switch a pipeline's progress bar off for a while."""
    name = "_progress_bar_config"
    before = pipeline.__dict__.get(name, _MISSING)
    setattr(pipeline, name, {**(before if isinstance(before, dict) else {}), "disable": True})
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(pipeline, name)
        else:
            setattr(pipeline, name, before)


@contextmanager
def quiet_load() -> Iterator[None]:
    """Keep loading bars, and remarks on optional packages that are not installed, to themselves."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loud = logging.getLogger("transformers").level
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(loud)
        if bars[0]:
            diffusers_logging.enable_progress_bar()
        if bars[1]:
            with warnings.catch_warnings():
                # It warns where the environment keeps the hub's bars off, which is as it was before.
                warnings.simplefilter("ignore", UserWarning)
                transformers_logging.enable_progress_bar()
