"""A record on disk: opened by its JSON alone, its tensors read when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from PIL import Image

from workbench.errors import InputError, StoreError
from workbench.tracing.ledger import Ledger, Row
from workbench.tracing.record import FORMAT, INDEX, VERSION, Forks, Passage, Record, RunSpec
from workbench.tracing.storage.disk import is_data_name, read_index
from workbench.tracing.storage.packing import TAG, Unsaved
from workbench.tracing.storage.unpacking import Reader, dtype_of, nodes_in


def load_record(folder: str | Path, *, model: Forks | None = None) -> SavedRecord:
    """Open a record that `Record.save` wrote; only its JSON is read now.

    Args:
        folder: where it was saved.
        model: the `DiffusionModel` it is to be forked with; it can be told later, as ``record.model``.

    Returns:
        A record like the one that was saved. Its tensors are mapped from their files when they are asked
        for: keep the folder as long as the record is used.

    Raises:
        StoreError: the folder is missing, holds something else, is damaged or of a newer version.
        InputError: ``model`` is no model.
    """
    if model is not None and not hasattr(model, "fork"):
        raise InputError(f"model={model!r} is no model. Open it first: model=wb.DiffusionModel({model!r}).")
    return SavedRecord(Path(folder).expanduser().absolute(), model)


@dataclass(frozen=True)
class Holding:
    """One line of what a saved record holds.

    Attributes:
        name: ``latents``, ``output.images``, ``unet.mid_block``, …
        count: how many tensors or images.
        shape: of the first, as ``2×16×4×4 float32``; ``differ`` after it where not all are alike.
        bytes: of all, in memory.
    """

    name: str
    count: int
    shape: str
    bytes: int


class SavedRecord(Record):
    """A record whose values lie in a folder; each is read when it is first asked for.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: Path, model: Forks | None = None) -> None:
        index = read_index(folder, INDEX, FORMAT, VERSION, what="a record")
        parts = {"values": dict, "files": dict, "spec": dict, "ledger": list}
        whole = all(isinstance(index.get(name), kind) for name, kind in parts.items())
        if not whole or not is_data_name(index.get("data")):
            raise StoreError(f"{folder / INDEX} is not complete. Copy the folder again, or record anew.")
        self.folder = folder
        self.model = model
        self._index = index
        self._reader = Reader(folder / index["data"], index["files"], load_record)
        self.ledger = Ledger(self._reader.read_as(Row, row) for row in index["ledger"])
        told = index.get("samplers")
        self.samplers = {name: str(each) for name, each in told.items()} if isinstance(told, dict) else {}

    @cached_property
    def spec(self) -> RunSpec:  # type: ignore[override]
        """What the run was asked for."""
        return self._reader.read_as(RunSpec, self._index["spec"])

    @cached_property
    def output(self) -> Any:
        """What the pipeline returned."""
        return self._read("output")

    @cached_property
    def captured(self) -> dict[str, list[Passage]]:  # type: ignore[override]
        """The passages by site."""
        return {site: [Passage(**each) for each in kept] for site, kept in self._read("captured").items()}

    @cached_property
    def calls(self) -> list[Any]:  # type: ignore[override]
        """What each denoiser call returned."""
        return list(self._read("calls"))

    @cached_property
    def ticks(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Latents, guided prediction and predicted clean sample of each tick."""
        return list(self._read("ticks"))

    @cached_property
    def initial(self) -> Any:  # type: ignore[override]
        """The latents the scheduler was first stepped with."""
        return self._read("initial")

    @cached_property
    def rng_state(self) -> Any:  # type: ignore[override]
        """The state of torch's global generator before the run."""
        return self._read("rng_state")

    @cached_property
    def attention(self) -> Any:
        """Attention maps, where they were asked for."""
        return self._read("attention")

    def fork(self, step: int, **changes: Any) -> Record:
        """Run again from ``step``, as `Record.fork` does.

        Raises:
            InputError: the record was not told its model, or lacks an argument that could not be saved.
        """
        if self.model is None:
            name = self.request.get("model") or "…"
            raise InputError(
                "A loaded record does not know its model. Tell it: "
                f"record.model = wb.DiffusionModel({name!r})."
            )
        for name, given in self.spec.arguments.items():
            if isinstance(given, Unsaved) and name not in changes:
                raise InputError(
                    f"{name} was a {given.what}, which could not be saved. Give it again: "
                    f"fork({step}, {name}=…)."
                )
        return super().fork(step, **changes)

    @property
    def request(self) -> dict[str, Any]:
        """What the run was asked for as the JSON says it; no file is read."""
        return dict(self._index["spec"])

    def holdings(self) -> list[Holding]:
        """Return what the record holds, from its JSON alone."""
        values = self._index["values"]
        parts: dict[str, Any] = {"initial": values.get("initial")}
        for name in ("latents", "noise_pred", "pred_x0"):
            parts[name] = [tick.get(name) for tick in values.get("ticks") or []]
        parts |= {name: values.get(name) for name in ("calls", "attention", "output")}
        parts |= values.get("captured") or {}
        return [found for name, node in parts.items() if (found := _holding(name, node)) is not None]

    def __repr__(self) -> str:
        sites = ", ".join(self._index["values"].get("captured", {})) or "nothing"
        return f"SavedRecord({str(self.folder)!r}: {self.ledger.steps} steps, captured {sites})"

    def _read(self, name: str) -> Any:
        return self._reader.read(self._index["values"].get(name))


def _holding(name: str, node: Any) -> Holding | None:
    found = [_spelled(each) for each in nodes_in(node, "tensor", "image")]
    if not found:
        return None
    text = found[0][0] + (", differ" if len({each for each, _ in found}) > 1 else "")
    return Holding(name, len(found), text, sum(size for _, size in found))


def _spelled(node: dict[str, Any]) -> tuple[str, int]:
    """Return what a tensor or an image is, and its bytes."""
    if node[TAG] == "image":
        (width, height), mode = node["size"], node["mode"]
        return f"{width}×{height} {mode} image", width * height * len(Image.new(mode, (1, 1)).tobytes())
    shape, dtype = "×".join(map(str, node["shape"])) or "scalar", node["dtype"]
    return f"{shape} {dtype}", prod(node["shape"]) * dtype_of(dtype).itemsize
