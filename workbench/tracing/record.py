"""What a run left behind."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from workbench.errors import InputError, OutOfOrderError, UnknownNameError, nearest
from workbench.tracing.ledger import ALL, GUIDED, Ledger, Row
from workbench.tracing.sites import Site
from workbench.tracing.storage.disk import new_data_name, staged, write_json
from workbench.tracing.storage.packing import Writer
from workbench.tracing.structure import Leaf, pick

INDEX, FORMAT, VERSION = "record.json", "workbench.record", 1
"""The file that makes a folder a record, and the version of the format."""


class RunSpec(BaseModel):
    """Everything a run was asked for, as data.

    Attributes:
        model: the model reference: a zoo name, a Hub id or a folder; "" for a live pipeline.
        arguments: the pipeline's own keyword arguments.
        seed: one seed, or one a sample; None leaves the noise to the pipeline.
        capture: the sites that were captured, as text or, with a choice of steps, rows or dtype, a `Capture`.
        interventions: each as data; of what was put in place by hand in a ``with`` block there is one mark,
            ``{"kind": "by hand", "sites": […], "steps": […]}``, None being outside the steps. A value edited
            in place (``hidden[:] = 0``) leaves none: nobody sees that.
        forked_at: the step at which the run left another, or None.
        block: whether the run was a block of the user's own code, which cannot be run again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    seed: int | tuple[int, ...] | None = None
    capture: tuple[Any, ...] = ()
    interventions: tuple[Any, ...] = ()
    forked_at: int | None = None
    block: bool = False


class Forks(Protocol):
    """The model that made a record and can run it again."""

    def fork(self, record: Record, step: int, changes: Mapping[str, Any]) -> Record:
        """Run ``record`` again from ``step`` with ``changes``."""


@dataclass
class Passage:
    """One value that passed a captured site.

    Attributes:
        call: the denoiser call it belongs to; None outside the calls and the scheduler's ticks.
        value: what passed.
        branch: the one branch whose rows were kept, ``"guided"`` for what passed in ``scheduler.step``;
            None is every row.
    """

    call: int | None
    value: Any
    branch: str | None = None


@dataclass
class Record:
    """A run's output and everything that was kept of it.

    Attributes:
        spec: what the run was asked for.
        output: what the pipeline returned.
        ledger: one row a denoiser call.
        initial: the latents the scheduler was first stepped with, ``(batch, channels, ...)``.
        latents: the latents after each tick, ``(ticks, batch, channels, ...)``.
        noise_pred: the guided prediction of each tick, the same shape.
        pred_x0: the predicted clean sample of each tick, the same shape, float32; None if the
            scheduler's convention is unknown.
        captured: the passages by site.
        calls: what each denoiser call returned: with the generators' states, enough to replay.
        rng_state: the state of torch's global generator before the run.
        attention: attention maps, where they were asked for.
        model: what made the record, and can fork it.
        samplers: by name, the schedulers of the run as text; a fork has the same.
    """

    spec: RunSpec
    ledger: Ledger = field(default_factory=Ledger)
    output: Any = None
    captured: dict[str, list[Passage]] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    ticks: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    initial: torch.Tensor | None = None
    rng_state: torch.Tensor | None = None
    attention: Any = None
    model: Forks | None = field(default=None, repr=False)
    samplers: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def images(self) -> Any:
        """The images the pipeline returned."""
        return self._of_output("images")

    @property
    def frames(self) -> Any:
        """The video frames the pipeline returned."""
        return self._of_output("frames")

    @property
    def audios(self) -> Any:
        """The sounds the pipeline returned."""
        return self._of_output("audios")

    @property
    def latents(self) -> torch.Tensor:
        """The latents after each tick, ``(ticks, batch, channels, ...)``."""
        return self._stack("latents")

    @property
    def noise_pred(self) -> torch.Tensor:
        """The guided prediction of each tick, ``(ticks, batch, channels, ...)``."""
        return self._stack("noise_pred")

    @property
    def pred_x0(self) -> torch.Tensor | None:
        """The predicted clean sample of each tick, ``(ticks, batch, channels, ...)``, float32, or None."""
        return None if any(tick["pred_x0"] is None for tick in self.ticks) else self._stack("pred_x0")

    def __getitem__(self, site: str | Site) -> torch.Tensor:
        """Return a captured site's values, ``(calls, ...)``.

        Raises:
            UnknownNameError: the site was not captured.
            InputError: the values differ in shape from call to call; use `at`.
        """
        passages, leaf = self._kept(site)
        values = [pick(each.value, leaf, site=str(site)) for each in passages]
        if len({tuple(value.shape) for value in values}) > 1:
            raise InputError(
                f"The values at {site} differ in shape from call to call; read one: at({str(site)!r}, step=…)"
            )
        return torch.stack(values)

    def passages(self, site: str | Site) -> list[Passage]:
        """Return every passage of a captured site, in order.

        Raises:
            UnknownNameError: the site was not captured.
            OutOfOrderError: it was, but no value passed there.
        """
        return self._kept(site)[0]

    def at(self, site: str | Site, *, step: int, branch: str = ALL, nth: int = 0) -> torch.Tensor:
        """Return a captured value at one step.

        Args:
            site: a captured site.
            step: which step; negative ones count from the end.
            branch: a guidance branch, or ``"all"`` for every row of the call.
            nth: which of the step's calls of that branch, for schedulers with two ticks a step.

        Returns:
            The value, ``(rows, ...)``.

        Raises:
            OutOfOrderError: the step has no such call, or the site did not pass in it.
        """
        passages, leaf = self._kept(site)
        if passages[0].branch == GUIDED:
            branch = ALL if branch in (GUIDED, "both") else branch
            rows = list({row.tick: row for row in self.ledger.at(step, branch)}.values())
        else:
            rows = self.ledger.at(step, branch)
        if not 0 <= nth < len(rows):
            raise OutOfOrderError(
                f"Step {step} has {len(rows)} calls of branch {branch!r}; there is no {nth}."
            )
        row: Row = rows[nth]
        for passage in passages:
            if passage.call == row.call:
                value = pick(passage.value, leaf, site=str(site))
                if passage.branch not in (None, branch) and branch not in (ALL, "both"):
                    raise OutOfOrderError(
                        f"Of {site} only the branch {passage.branch!r} was kept, not {branch!r}. "
                        "Record it without branch=…, or read what there is."
                    )
                whole = passage.branch is None
                part: torch.Tensor = value[row.rows(branch, value.shape[0])] if whole else value
                return part
        kept = sorted({self.ledger[each.call].step for each in passages if each.call is not None})
        raise OutOfOrderError(
            f"{site} did not pass in step {step} (call {row.call}) of this run, or was not kept there. "
            f"Steps with a value: {', '.join(map(str, kept)) or 'none'}."
        )

    def step_latents(self, step: int) -> torch.Tensor:
        """Return the latents a step leaves, ``(batch, channels, ...)``."""
        latents = self.ticks[self.ledger.last_tick(step)]["latents"]
        assert latents is not None
        return latents

    def fork(self, step: int, **changes: Any) -> Record:
        """Run again from ``step``: exact up to it, with ``changes`` from it on.

        Args:
            step: the first step that is computed anew; negative ones count from the end.
            **changes: pipeline arguments (``prompt``, ``guidance_scale``, …), ``interventions`` and
                ``capture``; what is not named stays as it was.

        Raises:
            InputError: the run has no such step, was ended before it, or cannot be run again.
        """
        if self.model is None:
            raise InputError("This record does not know its model, so it cannot be forked. Record it anew.")
        if not -self.ledger.steps <= step <= self.ledger.steps:
            raise InputError(f"The run has {self.ledger.steps} steps; it cannot fork at step {step}.")
        first = step % self.ledger.steps if step < 0 else step
        last = max((row.tick for row in self.ledger if row.step < first), default=-1)
        if self.output is None and last >= len(self.ticks):
            raise InputError(
                f"The run was ended within step {self.ledger.steps - 1}, so what that leaves is not known. "
                f"It can fork at that step or an earlier one, not at {step}."
            )
        return self.model.fork(self, first, changes)

    def asked(self, site: str) -> Any:
        """Return the `Capture` that chose what was kept at a site; None where everything was."""
        chosen = (each for each in self.spec.capture if not isinstance(each, str))
        return next((each for each in chosen if each.site == site), None)

    def save(self, folder: str | Path) -> Path:
        """Write the record into a folder, with everything it holds.

        The folder is written whole or not at all. A record that was there is replaced. Images are PNG
        files, tensors safetensors files, all else JSON; `workbench.load_record` opens it. What is no data
        (a function among the arguments) is warned of and marked as not saved.

        Args:
            folder: where to; made if it is not there.

        Returns:
            The folder.

        Raises:
            StoreError: something else is there, or it cannot be written.
        """
        target = Path(folder)
        with staged(target, INDEX, FORMAT) as staging:
            self.write_into(staging)
        return target

    def write_into(self, folder: Path) -> None:
        """Write the record's files and, at last, its index into an empty folder."""
        data = new_data_name()
        (folder / data).mkdir()
        writer = Writer(folder / data)
        kept = {site: [vars(each) for each in passages] for site, passages in self.captured.items()}
        values = {"captured": writer.write(kept, "captured")}
        for name in ("output", "ticks", "calls", "initial", "rng_state", "attention"):
            values[name] = writer.write(getattr(self, name), name)
        spec = writer.write(dict(self.spec), "spec", hashed=True)
        ledger = [writer.write({**dict(row), "branches": [*row.branches]}, "ledger") for row in self.ledger]
        writer.finish()
        if writer.unsaved:
            warnings.warn(
                f"Not data, so not saved: {', '.join(writer.unsaved[:4])}. All else is.", stacklevel=3
            )
        about: dict[str, Any] = {"format": FORMAT, "version": VERSION, "data": data, "files": writer.files}
        about["samplers"] = self.samplers
        write_json(folder / INDEX, {**about, "spec": spec, "ledger": ledger, "values": values})

    def _kept(self, site: str | Site) -> tuple[list[Passage], Leaf]:
        """Return a site's passages, and the selector still to be applied to them."""
        wanted = Site.parse(site)
        whole = Site(wanted.path, wanted.port)
        name, leaf = (str(wanted), ()) if str(wanted) in self.captured else (str(whole), wanted.leaf)
        if name not in self.captured:
            raise UnknownNameError(
                f"{wanted} was not captured in this run.{nearest(str(wanted), self.captured)} "
                f"Record it: record(..., capture=[{str(wanted)!r}])."
            )
        if not self.captured[name]:
            raise OutOfOrderError(
                f"{wanted} never passed in this run: its module was not called."
                if self.asked(name) is None
                else f"Nothing of {wanted} was kept: none of the run's calls is of {self.asked(name)}. "
                f"The run has {self.ledger.steps} steps and the branches {', '.join(self.ledger.branches)}."
            )
        return self.captured[name], leaf

    def _stack(self, name: str) -> torch.Tensor:
        values = [value for tick in self.ticks if (value := tick[name]) is not None]
        if len({tuple(value.shape) for value in values}) > 1:
            raise InputError(
                f"The {name} of this run's stages differ in shape. Read one tick's: record.ticks[0][{name!r}]"
            )
        return torch.stack(values)

    def _of_output(self, name: str) -> Any:
        # A modular pipeline returns its state, or just the list that `output="images"` asks for.
        state = getattr(self.output, "values", None)
        output = state if isinstance(state, dict) else self.output
        if isinstance(output, dict) and name in output:
            return output[name]
        if isinstance(output, Sequence) and name == "images":
            return output[0] if isinstance(output, tuple) else output
        known = [str(key) for key in output] if isinstance(output, dict) else []
        raise UnknownNameError(f"The pipeline returned no {name}.{nearest(name, known)} See record.output.")
