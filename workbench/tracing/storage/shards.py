"""The shards of a data set of activations: a safetensors file and its JSON, and what each row comes from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.errors import StoreError
from workbench.tracing.storage.disk import sync, write_json, write_tensors

INDEX, FORMAT, VERSION = "dataset.json", "workbench.activations", 1
"""The file that makes a folder a data set, and the version of the format."""


@dataclass(frozen=True)
class Origin:
    """Where one row of a data set comes from.

    Attributes:
        site: the site it passed.
        run: counts the runs of the data set from 0.
        prompt: the sample's prompt; None of a pipeline without.
        seed: the sample's noise seed; None where the run had none.
        call: the denoiser call; None outside of them, and so are step and timestep.
        step: the step.
        timestep: what the scheduler was stepped with.
        branch: the guidance branch; ``"all"`` outside the calls.
        row: the row within its branch.
    """

    site: str
    run: int
    prompt: str | None
    seed: int | None
    call: int | None
    step: int | None
    timestep: float | None
    branch: str
    row: int


class Stretch(BaseModel):
    """Rows of one call and branch that lie one after the other in a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: int
    call: int | None
    step: int | None
    timestep: float | None
    branch: str
    rows: int


class Kept(BaseModel):
    """What a shard has of one site: the shape of a row, the dtype, and the stretches in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    stretches: tuple[Stretch, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Where each stretch ends, in rows."""
        return list(accumulate(each.rows for each in self.stretches))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.ends[-1] if self.ends else 0


class Run(BaseModel):
    """What a run was asked for, as far as JSON says it; prompts and seeds are one a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    prompts: tuple[str | None, ...]
    seeds: tuple[int | None, ...]
    arguments: dict[str, Any]


class Shard(BaseModel):
    """The index of one shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    bytes: int
    sites: dict[str, Kept]
    runs: dict[int, Run]

    def origins(self, site: str) -> Iterator[Origin]:
        """Yield where each row of a site comes from."""
        for stretch in self.sites[site].stretches:
            for row in range(stretch.rows):
                yield self._origin(site, stretch, row)

    def origin(self, site: str, index: int) -> Origin:
        """Return where one row of a site comes from."""
        kept = self.sites[site]
        which = bisect_right(kept.ends, index)
        return self._origin(site, kept.stretches[which], index - (kept.ends[which - 1] if which else 0))

    def _origin(self, site: str, stretch: Stretch, row: int) -> Origin:
        run = self.runs[stretch.run]
        # A batch with heads or frames folded in has several rows a sample, one sample after the other.
        sample = row * len(run.prompts) // stretch.rows
        about = stretch.model_dump(exclude={"rows"})
        return Origin(site=site, prompt=run.prompts[sample], seed=run.seeds[sample], row=row, **about)


def write_shard(
    folder: Path, number: int, tensors: dict[str, torch.Tensor], sites: dict[str, Kept], runs: dict[int, Run]
) -> None:
    """Write a shard; it counts from the moment its JSON has its name.

    Args:
        folder: of the data set.
        number: which shard.
        tensors: each site's rows, ``(rows, ...)``.
        sites: what they are.
        runs: the runs they come from.
    """
    name = f"{number:06}.safetensors"
    partial = folder / f".{name}.partial"
    write_tensors(partial, tensors)
    sync(partial)
    size = partial.stat().st_size
    partial.replace(folder / name)
    shard = Shard(file=name, bytes=size, sites=sites, runs=runs)
    write_json(index_of(folder, number), shard.model_dump(mode="json"))


def read_shards(folder: Path) -> list[Shard]:
    """Read the indices of every shard that was written whole, in order.

    Raises:
        StoreError: one is not what was written, or its tensors are missing or cut short.
    """
    shards = []
    for path in shard_indices(folder):
        shard = read_shard(path)
        file = folder / path.with_suffix(".safetensors").name
        found = file.stat().st_size if file.is_file() else None
        if found != shard.bytes or shard.file != file.name:
            state = "is missing" if found is None else f"has {found} bytes of {shard.bytes}"
            raise StoreError(
                f"{file} {state}. Copy it again, or remove {path.name} to go on without its rows."
            )
        shards.append(shard)
    return shards


def read_shard(path: Path) -> Shard:
    """Read the index of one shard.

    Raises:
        StoreError: it is not what was written.
    """
    try:
        return Shard.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StoreError(f"{path} is damaged. Remove it to go on without its rows. ({error})") from error


def index_of(folder: Path, number: int) -> Path:
    """Return the JSON file of a shard."""
    return folder / f"{number:06}.json"


def shard_indices(folder: Path) -> Sequence[Path]:
    """Return the JSON files of the shards in order."""
    numbered = (path for path in folder.glob("*.json") if path.stem.isdecimal())
    return sorted(numbered, key=lambda path: int(path.stem))
