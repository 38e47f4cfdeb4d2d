"""From JSON and files back to values, each file opened when it is needed."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open

from workbench.errors import InputError, StoreError, WorkbenchError
from workbench.tracing.storage.classes import find, is_data, is_holder
from workbench.tracing.storage.packing import TAG, Unsaved

Made = TypeVar("Made")


class Reader:
    """Turns JSON back into values; tensors are mapped from their files, which are opened when needed.

    Args:
        folder: where the files lie.
        files: the size each of them must have.
        open_record: opens a folder that holds a record within the record.

    Raises:
        StoreError: a file is missing or has another size.
    """

    def __init__(self, folder: Path, files: Mapping[str, int], open_record: Callable[[Path], Any]) -> None:
        self.folder = folder
        self._files = files
        self._open_record = open_record
        self._open: dict[str, Any] = {}
        self._records: dict[str, Any] = {}
        self._generators: dict[str, torch.Generator] = {}
        for name, size in files.items():
            path = self._path(name)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes of {size}"
                raise StoreError(f"{path} {state}. Copy the whole folder again, or make it anew.")

    def read(self, node: Any) -> Any:
        """Return the value of a tree that a `Writer` made.

        Raises:
            StoreError: the files are not what was written, or need a class that is not there.
        """
        return self._checked(lambda: self._value(node))

    def read_as(self, kind: Callable[..., Made], node: Any) -> Made:
        """Return a tree of fields as the model they are of; raises as `read` does."""
        return self._checked(lambda: kind(**self._value(node)))

    def _checked(self, work: Callable[[], Made]) -> Made:
        try:
            return work()
        except WorkbenchError:
            raise
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise StoreError(f"{self.folder} was changed since it was saved: {error!r}.") from error

    def _value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self._value(item) for item in node]
        if not isinstance(node, dict):
            return node
        if TAG not in node:
            return {key: self._value(item) for key, item in node.items()}
        return getattr(self, "_read_" + node[TAG].replace(" ", "_"))(node)

    def _read_float(self, node: Any) -> float:
        return float(node["value"])

    def _read_tuple(self, node: Any) -> tuple[Any, ...]:
        return tuple(self._value(node["items"]))

    def _read_namedtuple(self, node: Any) -> Any:
        return find(node["class"], lambda kind: hasattr(kind, "_fields"))(*self._value(node["items"]))

    def _read_output(self, node: Any) -> Any:
        kind = find(node["class"], lambda kind: is_dataclass(kind) and issubclass(kind, dict))
        # What is None is no item of a model output, though it may be an argument without a default.
        missing = {each.name: None for each in fields(kind)}
        return kind(**{**missing, **self._value(node["items"])})

    def _read_data(self, node: Any) -> Any:
        return find(node["class"], is_data)(**self._value(node["fields"]))

    def _read_model(self, node: Any) -> Any:
        return find(node["class"], lambda kind: issubclass(kind, BaseModel))(**self._value(node["fields"]))

    def _read_object(self, node: Any) -> Any:
        kind = find(node["class"], is_holder)
        made = kind.__new__(kind)
        vars(made).update(self._value(node["state"]))
        return made

    def _read_dict(self, node: Any) -> dict[Any, Any]:
        return {self._value(key): self._value(item) for key, item in node["pairs"]}

    def _read_ordered(self, node: Any) -> OrderedDict[Any, Any]:
        return OrderedDict(self._read_dict(node))

    def _read_unsaved(self, node: Any) -> Unsaved:
        return Unsaved(str(node["what"]))

    def _read_size(self, node: Any) -> torch.Size:
        return torch.Size(node["items"])

    def _read_dtype(self, node: Any) -> torch.dtype:
        return dtype_of(node["name"])

    def _read_device(self, node: Any) -> torch.device:
        return torch.device(node["name"])

    def _read_slice(self, node: Any) -> slice:
        return slice(*node["items"])

    def _read_range(self, node: Any) -> range:
        return range(*node["items"])

    def _read_path(self, node: Any) -> Path:
        return Path(node["name"])

    def _read_generator(self, node: Any) -> torch.Generator:
        name = node.get("name")
        if name is None or name not in self._generators:
            generator = torch.Generator(node["device"])
            generator.set_state(self._value(node["state"]).clone())
            if name is None:
                return generator
            self._generators[name] = generator
        return self._generators[name]

    def _read_array(self, node: Any) -> Any:
        return self._value(node["tensor"]).numpy()

    def _read_listed_array(self, node: Any) -> Any:
        return np.array(self._value(node["items"]), dtype=node["dtype"]).reshape(node["shape"])

    def _read_scalar(self, node: Any) -> Any:
        return np.dtype(node["dtype"]).type(self._value(node["value"]))

    def _read_record(self, node: Any) -> Any:
        name = node["folder"]
        if name not in self._records:
            self._records[name] = self._open_record(self._path(name))
        return self._records[name]

    def _read_image(self, node: Any) -> Image.Image:
        if "tensor" in node:
            pixels = self._value(node["tensor"]).numpy().tobytes()
            return Image.frombytes(node["mode"], tuple(node["size"]), pixels)
        return Image.open(io.BytesIO(self._content(node["file"]))).copy()

    def _read_tensor(self, node: Any) -> torch.Tensor:
        name = node["file"]
        if name not in self._open:
            if name.startswith("files/"):
                self._content(name)
            try:
                self._open[name] = safe_open(self._path(name), "pt")
            except SafetensorError as error:
                raise StoreError(
                    f"{self._path(name)} is damaged ({error}). Copy the whole folder again, or make it anew."
                ) from error
        try:
            tensor: torch.Tensor = self._open[name].get_tensor(node["key"])
        except SafetensorError as error:
            raise StoreError(f"{self._path(name)} was changed since it was saved: {error}.") from error
        if node["dtype"] == "complex128":
            tensor = torch.view_as_complex(tensor)
        return tensor.as_strided(node["shape"], node["strides"]) if "strides" in node else tensor

    def _content(self, name: str) -> bytes:
        """Return a hashed file's bytes, if they are those that were written."""
        content = self._path(name).read_bytes()
        if hashlib.sha256(content).hexdigest() != PurePosixPath(name).stem:
            raise StoreError(
                f"{self._path(name)} is damaged: its hash is another. Copy the whole folder again, "
                "or make it anew."
            )
        return content

    def _path(self, name: str) -> Path:
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise StoreError(f"{self.folder} names a file outside of it, {name!r}; it was not saved so.")
        return self.folder / inside


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """Return the dtype of a name such as ``"float16"``.

    Raises:
        InputError: no dtype is called so.
    """
    found = name if isinstance(name, torch.dtype) else getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InputError(
            f"{name!r} is no dtype. Give 'float16', 'bfloat16', 'float32' or another of torch's."
        )
    return found


def nodes_in(node: Any, *tags: str) -> Iterator[dict[str, Any]]:
    """Yield what a tree of JSON says of its tensors or images, without reading one.

    Args:
        node: the tree.
        tags: ``"tensor"``, ``"image"`` or another kind; inside of one that fits there are no more.
    """
    if isinstance(node, list):
        for item in node:
            yield from nodes_in(item, *tags)
    elif isinstance(node, dict):
        if node.get(TAG) in tags:
            yield node
        else:
            for item in node.values():
                yield from nodes_in(item, *tags)
