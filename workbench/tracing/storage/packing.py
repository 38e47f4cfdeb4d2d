"""Values as JSON and files: what a record holds, whatever its structure.

A value becomes a tree of JSON in which tensors, arrays and images stand for files: tensors lie in one
safetensors file for each part of the record, images are lossless PNG, and what a run was *given* lies
in files named by the hash of their bytes. Nothing is pickled; classes are kept by name.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import singledispatch
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import save

from workbench.tracing.storage.classes import can_name, is_data, is_holder, name_of
from workbench.tracing.storage.disk import write_tensors

TAG = "~"
"""The key that marks a JSON object as something other than a dict."""

_PNG_MODES = ("1", "L", "LA", "RGB", "RGBA")


@dataclass(frozen=True)
class Unsaved:
    """Stands, in what was loaded, for something that cannot be kept as data: a function, a handle.

    Attributes:
        what: the type of what was there.
    """

    what: str


@runtime_checkable
class Folder(Protocol):
    """A value that is written as a folder of its own: a record within a record."""

    def write_into(self, folder: Path) -> None:
        """Write everything into an empty folder."""


class Where(NamedTuple):
    """A place in the tree: the part it belongs to, and the path in it."""

    part: str
    path: str = ""
    hashed: bool = False

    def at(self, key: object) -> Where:
        """Return the place of an item."""
        return self._replace(path=f"{self.path}/{key}" if self.path else str(key))


class Writer:
    """Turns values into JSON, and writes the files that it stands on.

    Args:
        folder: an empty folder.

    Attributes:
        files: the size of each file written, by its name in the folder.
        unsaved: where something was that cannot be kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        self.unsaved: list[str] = []
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._seen: dict[tuple[str, int], dict[str, Any]] = {}
        self._records: dict[int, str] = {}
        self._generators: dict[int, dict[str, Any]] = {}
        self._alive: list[Any] = []

    def write(self, value: Any, part: str, *, hashed: bool = False) -> Any:
        """Return one part of a record as JSON, its tensors in ``<part>.safetensors``.

        Args:
            value: what to keep.
            part: its name.
            hashed: write each tensor into a file of its own, named by its hash.
        """
        return self._node(value, Where(part, "", hashed))

    def finish(self) -> None:
        """Write the tensors of every part."""
        for part, tensors in self._tensors.items():
            name = f"{part}.safetensors"
            write_tensors(self.folder / name, _apart(tensors))
            self._note(name)

    def _node(self, value: Any, where: Where) -> Any:
        if isinstance(value, torch.Tensor):
            return self._known_tensor(value, where)
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return self._sequence(value, where)
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if isinstance(value, Image.Image):
            return self._image(value, where)
        if isinstance(value, torch.Generator):
            return self._generator(value, where)
        if isinstance(value, Folder):
            return self._record(value)
        node = _plain(value)
        return self._object(value, where) if node is NotImplemented else node

    def _generator(self, value: torch.Generator, where: Where) -> Any:
        """Return a generator's state, and a name to know it by: one may draw for several samples."""
        if id(value) not in self._generators:
            self._alive.append(value)
            state = self._tensor(value.get_state(), where)
            name = f"{where.part}/{where.path}"
            self._generators[id(value)] = {
                TAG: "generator",
                "device": str(value.device),
                "state": state,
                "name": name,
            }
        return self._generators[id(value)]

    def _object(self, value: Any, where: Where) -> Any:
        kind = type(value)
        if isinstance(value, BaseModel):
            return {TAG: "model", "class": name_of(kind), "fields": self._items(dict(value), where)}
        if is_data(kind):
            named = {each.name: getattr(value, each.name) for each in fields(value)}
            return {TAG: "data", "class": name_of(kind), "fields": self._items(named, where)}
        if is_holder(kind):
            return {TAG: "object", "class": name_of(kind), "state": self._items(vars(value), where)}
        self.unsaved.append(f"{where.part} {where.path} ({kind.__qualname__})")
        return {TAG: "unsaved", "what": kind.__qualname__}

    def _mapping(self, value: Mapping[Any, Any], where: Where) -> Any:
        if is_dataclass(value) and can_name(type(value)):
            return {TAG: "output", "class": name_of(type(value)), "items": self._items(value, where)}
        if type(value) is dict and TAG not in value and all(type(key) is str for key in value):
            return self._items(value, where)
        pairs = [[self._node(key, where), self._node(item, where.at(key))] for key, item in value.items()]
        return {TAG: "ordered" if isinstance(value, OrderedDict) else "dict", "pairs": pairs}

    def _sequence(self, value: Sequence[Any], where: Where) -> Any:
        items = [self._node(item, where.at(index)) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        if hasattr(value, "_fields") and can_name(type(value)):
            return {TAG: "namedtuple", "class": name_of(type(value)), "items": items}
        return {TAG: "tuple", "items": items}

    def _array(self, value: np.ndarray[Any, Any], where: Where) -> Any:
        try:
            # A copy: arrays that cannot be written to, or lie backwards, are none for torch.
            return {TAG: "array", "tensor": self._tensor(torch.from_numpy(value.copy("C")), where)}
        except TypeError:
            items = self._node(value.tolist(), where)
            return {TAG: "listed array", "dtype": str(value.dtype), "shape": [*value.shape], "items": items}

    def _image(self, value: Image.Image, where: Where) -> Any:
        about = {TAG: "image", "mode": value.mode, "size": [*value.size]}
        if value.mode in _PNG_MODES:
            stream = io.BytesIO()
            value.save(stream, "PNG")
            return {**about, "file": self._hashed(stream.getvalue(), "png")}
        pixels = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return {**about, "tensor": self._tensor(pixels, where)}

    def _known_tensor(self, value: torch.Tensor, where: Where) -> Any:
        known = self._seen.get((where.part, id(value)))
        if known is None:
            known = self._seen[where.part, id(value)] = self._tensor(value, where)
            # Its id stays its own as long as it lives.
            self._alive.append(value)
        return known

    def _items(self, items: Mapping[Any, Any], where: Where) -> dict[str, Any]:
        return {str(key): self._node(item, where.at(key)) for key, item in items.items()}

    def _tensor(self, value: torch.Tensor, where: Where) -> dict[str, Any]:
        stored, strides = _in_memory_order(value)
        about: dict[str, Any] = {
            TAG: "tensor",
            "shape": [*value.shape],
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        if strides is not None:
            about["strides"] = strides
        if stored.dtype == torch.complex128:
            stored = torch.view_as_real(stored)
        if where.hashed:
            return {**about, "file": self._hashed(save({"value": stored}), "safetensors"), "key": "value"}
        part = self._tensors.setdefault(where.part, {})
        key = where.path or "value"
        while key in part:
            key += "'"
        part[key] = stored
        return {**about, "file": f"{where.part}.safetensors", "key": key}

    def _hashed(self, content: bytes, ending: str) -> str:
        name = f"files/{hashlib.sha256(content).hexdigest()}.{ending}"
        if name not in self.files:
            (self.folder / "files").mkdir(exist_ok=True)
            (self.folder / name).write_bytes(content)
            self._note(name)
        return name

    def _record(self, value: Folder) -> dict[str, Any]:
        if id(value) not in self._records:
            name = f"records/{len(self._records)}"
            (self.folder / name).mkdir(parents=True)
            value.write_into(self.folder / name)
            self._records[id(value)] = name
            self._alive.append(value)
        return {TAG: "record", "folder": self._records[id(value)]}

    def _note(self, name: str) -> None:
        self.files[name] = (self.folder / name).stat().st_size


@singledispatch
def _plain(value: object) -> Any:
    """Return what needs no file as JSON; NotImplemented for everything else."""
    return value if value is None or isinstance(value, (bool, int, str)) else NotImplemented


@_plain.register
def _(value: float) -> Any:
    return value if isfinite(value) else {TAG: "float", "value": str(value)}


@_plain.register
def _(value: np.generic) -> Any:
    return {TAG: "scalar", "dtype": str(value.dtype), "value": _plain(value.item())}


@_plain.register
def _(value: torch.Size) -> Any:
    return {TAG: "size", "items": [*value]}


@_plain.register
def _(value: torch.dtype | torch.device) -> Any:
    return {TAG: type(value).__name__, "name": str(value).removeprefix("torch.")}


@_plain.register
def _(value: slice | range) -> Any:
    return {TAG: type(value).__name__, "items": [value.start, value.stop, value.step]}


@_plain.register
def _(value: Path) -> Any:
    return {TAG: "path", "name": str(value)}


def plain_json(value: Any) -> Any:
    """Return a value as JSON alone: what would need a file is its type's name."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    node = _plain(value)
    return type(value).__qualname__ if node is NotImplemented else node


def _in_memory_order(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int] | None]:
    """Return a tensor on the CPU as it lies in memory, and its strides where they are not the usual ones.

    Strides are part of the value: kernels choose their order of summation by them.
    """
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg()
    strides = list(plain.stride())
    if strides == list(torch.empty(plain.shape, device="meta").stride()):
        return plain, None
    span = sum((size - 1) * stride for size, stride in zip(plain.shape, strides, strict=True)) + 1
    if plain.numel() and span == plain.numel():
        return plain.as_strided((span,), (1,)), strides
    return plain.contiguous(), None


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy the tensors that share memory with an earlier one."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart
