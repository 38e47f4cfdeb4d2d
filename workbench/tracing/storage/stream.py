"""`Stream`: activations written to disk as a run goes on, for probes and sparse autoencoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError

from workbench.errors import InputError, StoreError
from workbench.tracing.capture import Capture
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import branch_rows
from workbench.tracing.storage.disk import locked, read_index, write_json
from workbench.tracing.storage.packing import plain_json
from workbench.tracing.storage.shards import (
    FORMAT,
    INDEX,
    VERSION,
    Kept,
    Run,
    Stretch,
    index_of,
    read_shard,
    shard_indices,
    write_shard,
)
from workbench.tracing.structure import pick


class Stream:
    """Writes what passes at sites into a folder, in shards; give it in ``capture``.

    Run after run is appended, also to a folder of an earlier day. At most one shard is held in memory
    (twice while it is written). A run's end completes its last shard; in a ``with`` block shards are
    filled across runs, and the block's end completes the last. What was completed stays readable,
    whatever happens to the process; `ActivationDataset` reads it.

    Args:
        folder: of the data set; made if it is not there.
        sites: where: site texts, or `Capture` for a choice of steps and branch.
        dtype: how floating point values are kept (``"float16"``); None is as they are.
        shard_bytes: a shard is completed when it holds this much.

    Raises:
        StoreError: the folder holds something else, or a data set of other sites or another dtype.
        InputError: no sites, or a shard of no bytes.

    Example:
        >>> with Stream("activations", ["unet.mid_block"], dtype="float16") as stream:
        ...     for prompt in prompts:
        ...         model.record(prompt, seed=0, capture=[stream])
    """

    def __init__(
        self,
        folder: str | Path,
        sites: Sequence[str | Capture],
        *,
        dtype: str | torch.dtype | None = None,
        shard_bytes: int = 256 << 20,
    ) -> None:
        if isinstance(sites, (str, Capture)) or not sites:
            raise InputError(
                f"sites takes a list of at least one site, not {sites!r}: sites=['unet.mid_block']."
            )
        if not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise InputError(f"shard_bytes={shard_bytes!r} is not a number of bytes, such as 256 << 20.")
        asked = [
            replace(each, device="cpu") if isinstance(each, Capture) else Capture(each, dtype=dtype)
            for each in sites
        ]
        self._captures = {each.sites[0]: each for each in asked}
        if len(self._captures) < len(asked):
            raise InputError("A site is given twice. Give each once.")
        self.folder = Path(folder).expanduser().absolute()
        self._shard_bytes = shard_bytes
        self._buffer: dict[str, list[torch.Tensor]] = {}
        self._stretches: dict[str, list[Stretch]] = {}
        self._runs: dict[int, Run] = {}
        self._held = 0
        self._run = -1
        self._number = -1
        self._block: ExitStack | None = None
        self._open_folder()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it takes from."""
        return tuple(self._captures)

    def __enter__(self) -> Self:
        """Fill shards across runs until the block ends."""
        self._block = ExitStack()
        self._block.enter_context(self._writing())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the last shard."""
        block, self._block = self._block, None
        if block is not None:
            block.close()

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Take part in a run."""
        with ExitStack() as stack:
            if self._block is None:
                stack.enter_context(self._writing())
            self._run += 1
            self._runs[self._run] = _run_of(session)
            yield

    def take(self, session: Session, site: Site, value: Any) -> None:
        """Take a value's rows, branch by branch; a full shard is written."""
        row = session.clock.now
        if session.replaying(row):
            return
        tensor = pick(value, site.leaf, site=str(site))
        passage = self._captures[site].passage(tensor, row, session.clock.total_steps)
        if passage is None:
            return
        for branch, rows in self._branches(passage.branch, row, passage.value):
            self._add(str(site), passage.value[rows], row, branch)
        if self._held >= self._shard_bytes:
            self._complete()

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record: the values are on disk."""

    def _branches(self, one: str | None, row: Row | None, value: torch.Tensor) -> list[tuple[str, slice]]:
        if row is None or one is not None:
            return [(one or "all", slice(None))]
        return branch_rows(row, "all", value.shape[0])

    def _add(self, site: str, rows: torch.Tensor, row: Row | None, branch: str) -> None:
        held = self._buffer.get(site)
        if held and (held[0].shape[1:], held[0].dtype) != (rows.shape[1:], rows.dtype):
            self._complete()
        about = (
            {"call": None, "step": None, "timestep": None}
            if row is None
            else row.model_dump(include={"call", "step", "timestep"})
        )
        self._buffer.setdefault(site, []).append(rows)
        self._stretches.setdefault(site, []).append(
            Stretch(run=self._run, branch=branch, rows=len(rows), **about)
        )
        self._held += rows.numel() * rows.element_size()

    def _complete(self) -> None:
        """Write what is held as a shard."""
        if not self._held:
            return
        tensors, sites = {}, {}
        for site in list(self._buffer):
            rows = tensors[site] = torch.cat(self._buffer.pop(site)).contiguous()
            dtype = str(rows.dtype).removeprefix("torch.")
            sites[site] = Kept(
                shape=tuple(rows.shape[1:]), dtype=dtype, stretches=tuple(self._stretches.pop(site))
            )
        runs = {each.run: self._runs[each.run] for kept in sites.values() for each in kept.stretches}
        self._held = 0
        try:
            write_shard(self.folder, self._number, tensors, sites, runs)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{self.folder} cannot be written: {error}. Its earlier shards are whole."
            ) from error
        self._number += 1
        self._runs = {self._run: self._runs[self._run]}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the folder's only writer, go on where it ends, and complete the last shard."""
        with locked(self.folder, wait=False):
            if self._number < 0 or index_of(self.folder, self._number).exists():
                self._go_on()
            try:
                yield
            finally:
                self._complete()

    def _go_on(self) -> None:
        """Count shards and runs from where the folder ends."""
        last = next(reversed(shard_indices(self.folder)), None)
        self._number = 0 if last is None else int(last.stem) + 1
        self._run = -1 if last is None else max(read_shard(last).runs)

    def _open_folder(self) -> None:
        about = [plain_json(vars(each)) for each in self._captures.values()]
        index = {"format": FORMAT, "version": VERSION, "sites": about}
        if self.folder.is_dir() and any(item.suffix != ".partial" for item in self.folder.iterdir()):
            found = read_index(self.folder, INDEX, FORMAT, VERSION, what="a data set")
            if found.get("sites") != about:
                raise StoreError(
                    f"{self.folder} holds activations of {_spell(found.get('sites'))}, "
                    f"not of {_spell(about)}. Ask for the same, or choose another folder."
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / INDEX, index)
        except OSError as error:
            raise StoreError(
                f"{self.folder} cannot be written: {error.strerror}. Choose another folder."
            ) from error


def _run_of(session: Session) -> Run:
    """Return what a run was asked for, a prompt and a seed for each of its samples."""
    spec, samples = session.record.spec, session.clock.rows or 1
    prompt, generator = spec.arguments.get("prompt"), session.arguments.get("generator")
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    generators = generator if isinstance(generator, list) else [generator]
    return Run(
        model=spec.model,
        prompts=tuple(prompts[sample * len(prompts) // samples] for sample in range(samples)),
        seeds=tuple(_seed(generators[sample * len(generators) // samples]) for sample in range(samples)),
        arguments=plain_json(spec.arguments),
    )


def _seed(generator: torch.Generator | None) -> int | None:
    """Return what a generator was seeded with; torch tells a negative seed as one of 64 bits."""
    return None if generator is None else (generator.initial_seed() + 2**63) % 2**64 - 2**63


def _spell(sites: Any) -> str:
    return ", ".join(f"{each['site']} in {each['dtype'] or 'its own dtype'}" for each in sites or [])
