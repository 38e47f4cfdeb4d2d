"""A sweep's folder: its definition, and a file for each batch of cells that was measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.errors import StoreError
from workbench.tracing.storage.disk import locked, read_index, write_json

INDEX, FORMAT, VERSION = "sweep.json", "workbench.sweep", 1
"""The file that makes a folder a sweep's, and the version of the format."""

_BATCH = re.compile(r"^batch-(\d{6,})\.json$")
_PARTIAL = re.compile(r"^\.(?:sweep|batch-\d{6,})\.json\.[0-9a-f]{8}\.partial$")
_ALIKE = 1e-3
"""How far a run may be from what it was, relative to its size: another machine rounds otherwise."""


class Result(BaseModel):
    """What was measured of one trial.

    Attributes:
        kind: ``"cell"``, ``"random"``, ``"identity"`` or ``"floor"``.
        cell: the number of the cell; of a pair's controls, its first.
        values: by metric; None is not a number.
        error: why there are no values, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kind: str
    cell: int
    values: dict[str, float | None] = {}
    error: str | None = None


class Batch(BaseModel):
    """What is committed at once.

    Attributes:
        sweep: the hash of the sweep's definition.
        number: its number in the plan.
        results: of each trial.
        prints: of each pair of runs, some numbers by which to know them again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    sweep: str
    number: int
    results: tuple[Result, ...]
    prints: dict[int, tuple[float, ...]] = {}


@dataclass(frozen=True)
class SweepStore:
    """A sweep's folder.

    Attributes:
        folder: where; made if it is not there.
        key: the hash of the sweep's definition.
        definition: the definition, for whoever opens the folder later.
    """

    folder: str | Path
    key: str
    definition: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The folder, in full."""
        return Path(self.folder).expanduser().resolve()

    @contextmanager
    def opened(self) -> Iterator[SweepStore]:
        """Be the only writer of the folder, and see that it is this sweep's.

        Raises:
            StoreError: it holds another sweep or something else, or cannot be written.
            BusyError: another writer is at it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror}. Choose another.") from error
        with locked(self.path, wait=False):
            others = [item.name for item in self.path.iterdir() if not _PARTIAL.match(item.name)]
            if others:
                self._check()
            for item in self.path.iterdir():
                if _PARTIAL.match(item.name):
                    item.unlink(missing_ok=True)
            if not others:
                about = {"format": FORMAT, "version": VERSION, "sweep": self.key}
                self._write(INDEX, {**about, "definition": self.definition})
            yield self

    def read(self) -> dict[int, Batch]:
        """Return the batches that were committed, by number; what is torn does not count.

        Raises:
            StoreError: the folder is not this sweep's.
        """
        self._check()
        found = {}
        for item in sorted(self.path.iterdir()):
            match = _BATCH.match(item.name)
            if match is None:
                continue
            try:
                batch = Batch.model_validate_json(item.read_bytes())
            except (OSError, ValidationError):
                continue
            if batch.sweep == self.key and batch.number == int(match[1]):
                found[batch.number] = batch
        return found

    def commit(self, batch: Batch) -> None:
        """Write a batch, whole and on the disk before this returns.

        Raises:
            StoreError: it cannot be written.
        """
        self._write(f"batch-{batch.number:06}.json", json.loads(batch.model_dump_json()))

    def check_prints(self, known: Sequence[float], made: Sequence[float]) -> None:
        """Refuse to go on with runs that are not what they were.

        Raises:
            StoreError: the numbers by which a pair of runs is known differ.
        """
        size = max(map(abs, known), default=0.0)
        alike = len(known) == len(made) and all(
            math.isclose(one, other, rel_tol=_ALIKE, abs_tol=_ALIKE * size)
            for one, other in zip(known, made, strict=True)
        )
        if not alike:
            raise StoreError(
                f"{self.path} was begun with a model that gives other pictures: its weights, its dtype or a "
                "package has changed since. Go on with what it was begun with, or choose another folder."
            )

    def _check(self) -> None:
        index = read_index(self.path, INDEX, FORMAT, VERSION, what="a sweep")
        if index.get("sweep") != self.key:
            theirs = index.get("definition")
            differing = [
                name
                for name, value in json.loads(json.dumps(self.definition)).items()
                if not isinstance(theirs, dict) or theirs.get(name) != value
            ]
            raise StoreError(
                f"{self.path} holds another sweep: it differs in {', '.join(differing) or 'its version'}. "
                "Choose another folder, or ask for the sweep that it was begun with."
            )

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            write_json(self.path / name, content)
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}. What was committed before is kept."
            ) from error
