"""Folders that are written whole or not at all.

A folder of ours has an index, a JSON file that names its format, and beside it one folder of data with a
name of its own. Everything is written under a temporary name, brought to the disk and renamed; an index
takes the place of an older one in one step, so that whoever reads finds the old or the new, whenever the
writer dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from workbench.errors import BusyError, StoreError

_DATA = re.compile(r"^data-[0-9a-f]{16}$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_SHARD_INDEX = re.compile(r"(?P<stem>\w+)\.(?P<kind>safetensors|bin)\.index(?P<variant>\.\w+)?\.json")


def new_data_name() -> str:
    """Return a name for a folder of data that no other has."""
    return f"data-{secrets.token_hex(8)}"


def is_data_name(name: object) -> bool:
    """Whether a name is one that `new_data_name` gives."""
    return isinstance(name, str) and _DATA.match(name) is not None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under a temporary name, bring it to the disk and rename it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that others may read as they may read any file written here."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)


def read_index(folder: Path, name: str, kind: str, version: int, *, what: str) -> dict[str, Any]:
    """Read the index of a folder of ours.

    Args:
        folder: the folder.
        name: the index's file name.
        kind: its format.
        version: the newest version of the format that is understood.
        what: how messages call what the folder holds.

    Raises:
        StoreError: the folder is missing, holds something else, is cut short or too new.
    """
    path = folder / name
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise StoreError(f"{folder} is {found}; give the folder that {what} was saved in.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
        raise StoreError(
            f"{folder} holds no {what.removeprefix('a ')}: it has no {name}, only {inside}."
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). It was cut short or changed: copy the folder again, "
            "or make it anew."
        ) from error
    if (
        not isinstance(index, dict)
        or index.get("format") != kind
        or not isinstance(index.get("version"), int)
    ):
        raise StoreError(
            f"{path} is not ours: its format is not {kind!r}. Give a folder the workbench saved."
        )
    if index["version"] > version:
        raise StoreError(
            f"{folder} is written in version {index['version']} of {kind!r}, and this workbench reads up to "
            f"{version}. Update diffusion-workbench to open it."
        )
    return index


@contextmanager
def staged(target: Path, index: str, kind: str) -> Iterator[Path]:
    """Give a folder to write in; when the block ends well, its content is at ``target``.

    A folder of the same format that was there is replaced. After an error all is as it was; after the
    process was killed too, but for a hidden folder beside, which the next write removes.

    Args:
        target: where the content is to be.
        index: the name of the JSON file that the block writes, with its format in it.
        kind: the format.

    Raises:
        StoreError: something else is there, or it cannot be written.
    """
    target = target.expanduser().resolve()
    _check_free(target, index, kind)
    with _staging(target.parent, target, (OSError, SafetensorError)) as staging:
        yield staging
        _sync_all(staging)
        _move(staging, target, index)


@contextmanager
def merged(target: Path) -> Iterator[Path]:
    """Give a folder for others' code to write in; when the block ends well, its files are in ``target``.

    There each takes the place of the one of its name, and weights of however many shards that of the same
    weights; what else is there stays. After an error all is as it was.

    Args:
        target: where the files are to be.

    Raises:
        StoreError: it is a file, or cannot be written.
    """
    target = target.expanduser().resolve()
    _check_no_file(target)
    new = not target.exists()
    try:
        with _staging(target, target, Exception) as staging:
            yield staging
            _sync_all(staging)
            _merge(staging, target)
    finally:
        if new and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


@contextmanager
def _staging(
    parent: Path, target: Path, errors: type[Exception] | tuple[type[Exception], ...]
) -> Iterator[Path]:
    """Give a hidden folder in ``parent``, which is gone afterwards; what cannot be written is said."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, target.name)
        owner = f"{platform.node()}-{os.getpid()}"
        staging = parent / f".{target.name}.{owner}-{secrets.token_hex(4)}.partial"
        staging.mkdir()
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        yield staging
    except errors as error:
        raise StoreError(
            f"{target} could not be written: {error}. What was there before is untouched."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Be the only writer of a folder; the system lets go when the process dies.

    Raises:
        BusyError: another writer is at it, and ``wait`` is false.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"Another writer is at {folder}. Give each writer a folder of its own.") from None
        yield
    finally:
        os.close(handle)


def _check_free(target: Path, index: str, kind: str) -> None:
    if target.is_dir():
        inside = sorted(item.name for item in target.iterdir())
        if not inside or _format_of(target / index) == kind:
            return
        raise StoreError(
            f"{target} holds something else ({', '.join(inside[:4])}), which would be lost. "
            "Choose another folder."
        )
    _check_no_file(target)


def _check_no_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StoreError(f"{target} is a file. Choose another name for the folder.")


def _format_of(path: Path) -> object:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("format") if isinstance(content, dict) else None


def _move(staging: Path, target: Path, index: str) -> None:
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)
    else:
        with locked(target, wait=True):
            fresh = [item.name for item in staging.iterdir() if is_data_name(item.name)]
            for name in fresh:
                (staging / name).rename(target / name)
            sync(target)
            (staging / index).replace(target / index)
            sync(target)
            for item in target.iterdir():
                if is_data_name(item.name) and item.name not in fresh:
                    shutil.rmtree(item, ignore_errors=True)
    sync(target.parent)


def _merge(staging: Path, target: Path) -> None:
    """Move files into place, those at the top last: an index then names what is there."""
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    for folder in {file.parent for file in files}:
        (target / folder).mkdir(parents=True, exist_ok=True)
    for file in sorted(files, key=lambda file: len(file.parts), reverse=True):
        (staging / file).replace(target / file)
    written = {file.parent / _unsharded(file.name) for file in files}
    for folder in {file.parent for file in files}:
        for item in (target / folder).iterdir():
            now = item.relative_to(target)
            if item.is_file() and now not in files and folder / _unsharded(item.name) in written:
                item.unlink()
        sync(target / folder)


def _unsharded(name: str) -> str:
    """Return the name that weights have which are not in shards: of a shard, or of the index of them."""
    whole = _SHARD.sub("", name)
    index = _SHARD_INDEX.match(whole)
    return whole if index is None else f"{index['stem']}{index['variant'] or ''}.{index['kind']}"


def _sync_all(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))


def _sweep(parent: Path, name: str) -> None:
    """Remove what writers of the folder of this name left that died on this machine."""
    pattern = re.compile(rf"^\.{re.escape(name)}\.{re.escape(platform.node())}-(\d+)-[0-9a-f]{{8}}\.partial$")
    for item in parent.iterdir():
        found = pattern.match(item.name)
        if found is not None and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(item, ignore_errors=True)
