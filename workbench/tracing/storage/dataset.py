"""`ActivationDataset`: the rows that streams have written, read a row or a shard at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from workbench.errors import InputError, StoreError, UnknownNameError, nearest
from workbench.tracing.storage.disk import read_index
from workbench.tracing.storage.shards import FORMAT, INDEX, VERSION, Origin, read_shards


class ActivationDataset(Dataset[Any]):
    """One site's activations, as a data set for torch's ``DataLoader``.

    An item is one row, ``(...)`` in the shape it had behind the batch axis; with ``label``, a pair of the
    row and its label. Only the indices are read at the beginning.

    Args:
        folder: that a `Stream` wrote.
        site: which site; None where there is one only.
        label: gives a row's label from its `Origin`: ``lambda origin: origin.step``.

    Attributes:
        folder: where it lies.
        site: which site.
        sites: the sites there are.

    Raises:
        StoreError: the folder is missing, holds something else or is damaged.
        UnknownNameError: it has no such site.
        InputError: it has several and none was named.

    Example:
        >>> dataset = ActivationDataset("activations", label=lambda origin: origin.step)
        >>> for rows, steps in torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True):
        ...     ...
    """

    def __init__(
        self, folder: str | Path, site: str | None = None, *, label: Callable[[Origin], Any] | None = None
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        index = read_index(self.folder, INDEX, FORMAT, VERSION, what="a data set")
        self.sites = tuple(each["site"] for each in index["sites"])
        if site is None and len(self.sites) > 1:
            raise InputError(
                f"{self.folder} has several sites. Name one: site={self.sites[0]!r}.{nearest('', self.sites)}"
            )
        self.site = self.sites[0] if site is None else site
        if self.site not in self.sites:
            raise UnknownNameError(
                f"{self.folder} has no activations of {site!r}.{nearest(self.site, self.sites)}"
            )
        self.label = label
        self._shards = [shard for shard in read_shards(self.folder) if self.site in shard.sites]
        self._ends = list(accumulate(shard.sites[self.site].rows for shard in self._shards))

    def __len__(self) -> int:
        """How many rows there are."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        """Return one row, read by itself; with ``label``, the row and its label.

        Raises:
            IndexError: there is no such row.
        """
        shard, row = self._find(index)
        tensor = self._open(shard)[row].clone()
        return tensor if self.label is None else (tensor, self.label(self.origin(index)))

    def origin(self, index: int) -> Origin:
        """Return where a row comes from: run, prompt, seed, call, step, timestep, branch."""
        shard, row = self._find(index)
        return self._shards[shard].origin(self.site, row)

    def origins(self) -> Iterator[Origin]:
        """Yield where each row comes from, in order."""
        for shard in self._shards:
            yield from shard.origins(self.site)

    def shards(self) -> Iterator[tuple[torch.Tensor, list[Origin]]]:
        """Yield shard by shard the rows ``(rows, ...)``, mapped from the file, and where each comes from."""
        for index, shard in enumerate(self._shards):
            yield self._open(index), list(shard.origins(self.site))

    def __repr__(self) -> str:
        size = f"{len(self)} rows in {len(self._shards)} shards"
        return f"ActivationDataset({str(self.folder)!r}, {self.site!r}: {size})"

    def _find(self, index: int) -> tuple[int, int]:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"The data set has {len(self)} rows; {index} is none of them.")
        shard = bisect_right(self._ends, place)
        return shard, place - (self._ends[shard - 1] if shard else 0)

    def _open(self, index: int) -> torch.Tensor:
        """Map a shard's rows; a mapping costs no memory until its pages are read."""
        path = self.folder / self._shards[index].file
        try:
            with safe_open(path, "pt") as file:
                rows: torch.Tensor = file.get_tensor(self.site)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{path} is damaged ({error}). Copy it again, or remove its .json file."
            ) from error
        return rows
