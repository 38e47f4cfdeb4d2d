"""Runs of one sample each, as the rows of one run, and back.

What a fork of the joined record computes for a row is what a fork of its own record would, but for rounding:
kernels differ by the size of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from workbench.errors import InputError
from workbench.tracing.ledger import Ledger, Row
from workbench.tracing.record import Record
from workbench.tracing.structure import describe

_OF_THE_SCHEDULE = ("timesteps", "sigmas", "num_inference_steps")
"""Arguments that are lists, and of the run, not of its samples."""


def joined(records: Sequence[Record]) -> Record:
    """Return one record, as if its samples had been made in one run.

    Args:
        records: runs of one sample each, alike in all but their seeds and prompts. The same may stand
            several times.

    Returns:
        A record to fork: with the latents and calls of all, ``(samples, ...)``, and without captures or
        output.

    Raises:
        InputError: they are not alike, have several samples, or no seed.
    """
    first = records[0]
    for each in records:
        _check_alike(first, each)
    count, ways = len(records), _ways(first)
    arguments = _joined_arguments([each.spec.arguments for each in records])
    if "prompt" not in arguments and "batch_size" in _parameters(first):
        arguments["batch_size"] = count
    spec = first.spec.model_copy(
        update={
            "arguments": arguments,
            "seed": tuple(_seed(each) for each in records),
            "capture": (),
            "interventions": (),
        }
    )
    return Record(
        spec,
        ledger=Ledger(row.model_copy(update={"samples": count}) for row in first.ledger),
        calls=[
            _stacked([each.calls[row.call] for each in records], len(row.branches)) for row in first.ledger
        ],
        ticks=[
            {name: _stacked([each.ticks[index][name] for each in records], ways) for name in tick}
            for index, tick in enumerate(first.ticks)
        ],
        initial=_stacked([each.initial for each in records], ways),
        rng_state=first.rng_state,
        model=first.model,
    )


def separate(record: Record) -> list[Record]:
    """Return a run of several samples as a record for each.

    Each has its own latents, predictions and output; no captures, and no calls to be run again from.
    """
    count, ways = record.ledger[0].samples or 1, _ways(record)
    ledger = Ledger(row.model_copy(update={"samples": 1}) for row in record.ledger)
    return [
        Record(
            record.spec,
            ledger=ledger,
            output=_of_sample(record.output, index, count),
            ticks=[
                {name: _rows_of(value, index, count, ways) for name, value in tick.items()}
                for tick in record.ticks
            ],
            initial=_rows_of(record.initial, index, count, ways),
        )
        for index in range(count)
    ]


def _ways(record: Record) -> int:
    """Return how many parts the latents have, each with all samples.

    Some pipelines step the latents of every branch, which are all the same (DiT).
    """
    row, latents = record.ledger[0], record.initial
    branches = len(row.branches)
    return branches if latents is not None and len(latents) == branches * (row.samples or 1) else 1


def _rows_of(tensor: torch.Tensor | None, sample: int, count: int, ways: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    rows = tensor.reshape(ways, count, -1, *tensor.shape[1:])
    return rows[:, sample].flatten(0, 1)


def _check_alike(first: Record, other: Record) -> None:
    if not first.ledger or not other.ledger or not other.calls:
        raise InputError("A run without denoiser calls cannot be a row of another.")
    if other.ledger[0].samples != 1:
        raise InputError(
            f"A run of {other.ledger[0].samples} samples cannot be a row of another: give runs of one each."
        )
    if [_clock(row) for row in first.ledger] != [_clock(row) for row in other.ledger]:
        raise InputError("Runs whose steps, branches or components differ cannot be rows of one.")


def _clock(row: Row) -> tuple[Any, ...]:
    return row.step, row.tick, row.timestep, row.branches, row.component


def _seed(record: Record) -> int:
    seed = record.spec.seed
    if seed is None:
        raise InputError("A run without a seed cannot be a row of another: its noise is not known.")
    return seed if isinstance(seed, int) else seed[0]


def _parameters(record: Record) -> Mapping[str, Any]:
    pipeline = getattr(record.model, "pipeline", None)
    return inspect.signature(pipeline).parameters if callable(pipeline) else {}


def _joined_arguments(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for arguments in each for name in arguments)
    found = {}
    for name in names:
        values = [arguments.get(name) for arguments in each]
        found[name] = _joined_argument(name, values)
    return found


def _joined_argument(name: str, values: Sequence[Any]) -> Any:
    """Return an argument of several samples: one for all where it is of the run, else side by side."""
    first = values[0]
    if "prompt" in name and all(isinstance(value, str) for value in values):
        return list(values)
    if name not in _OF_THE_SCHEDULE:
        if all(isinstance(value, torch.Tensor) and value.ndim and len(value) == 1 for value in values):
            return torch.cat(list(values))
        if all(isinstance(value, (list, tuple)) and len(value) == 1 for value in values):
            return [value[0] for value in values]
    if not all(_same(first, value) for value in values):
        raise InputError(f"Runs that differ in {name} cannot be rows of one.")
    return first


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one is other
    return bool(one is other or one == other)


def _stacked(values: Sequence[Any], branches: int = 1) -> Any:
    """Return tensors of one sample each side by side, within each branch, in the structure they are in."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        if any(value.shape != first.shape for value in values) or len(first) % branches:
            raise InputError(
                "Runs whose values differ in shape cannot be rows of one: "
                + ", ".join(dict.fromkeys(describe(value) for value in values))
            )
        parts = [value.reshape(branches, -1, *value.shape[1:]) for value in values]
        return torch.cat(parts, 1).flatten(0, 1)
    if isinstance(first, Mapping):
        items = {key: _stacked([value[key] for value in values], branches) for key in first}
        return items if type(first) is dict else type(first)(**items)
    if isinstance(first, (tuple, list)):
        return type(first)([_stacked(each, branches) for each in zip(*values, strict=True)])
    return first


def _of_sample(value: Any, index: int, count: int) -> Any:
    """Return what is of one sample in an output: its part of a list, a tensor or an array."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if not value.ndim or len(value) % count:
            return value
        width = len(value) // count
        return value[index * width : (index + 1) * width]
    if isinstance(value, Mapping):
        # A model output leaves out of its items what is None, and needs it to be made.
        names = [each.name for each in fields(value)] if is_dataclass(value) else list(value)
        items = {name: _of_sample(value.get(name), index, count) for name in names}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, list):
        return [value[index]] if len(value) == count else value
    if isinstance(value, tuple):
        return tuple(_of_sample(item, index, count) for item in value)
    return value
