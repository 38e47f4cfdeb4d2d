"""The controls of a run: prompts, seed, steps, guidance, progress, Run and Stop."""

from __future__ import annotations

from typing import ClassVar, Literal

import traitlets as t

from workbench.widgets.element import Element, Message
from workbench.widgets.static_html import table

# Largest integer that a JavaScript number holds exactly.
_LARGEST_SEED = 2**53 - 1


class Run(Message):
    """Run with what the fields say."""

    kind: Literal["run"]


class Stop(Message):
    """Stop the run."""

    kind: Literal["stop"]


class Dismiss(Message):
    """The error has been read."""

    kind: Literal["dismiss"]


class RunControls(Element):
    """Two prompts, the numbers of a run, its progress with a live preview, Run and Stop.

    Attributes:
        model_name: shown first.
        scheduler: shown beside it.
        source: the prompt an activation comes from.
        target: the prompt it is put into.
        seed: seed of the noise.
        steps: number of inference steps.
        guidance: guidance scale.
        source_from: the step at which the source leaves the target's run; 0 is a run of its own.
        source_seed: seed of the source's noise, shown if it has its own; None is ``seed``.
        can_prompt: whether the pipeline takes a prompt; without one, runs differ by their seeds.
        can_guide: whether the pipeline takes a guidance scale.
        can_step: whether it takes a number of steps.
        status: ``idle``, ``running``, ``stopping``, ``error`` or ``done``.
        progress: ``{label, step, of, rate, left}``: steps a second and seconds left, or ``None``.
        preview: PNG of what the model expects the image to be.
        error: ``{title, text}`` to show in a box; empty for none.
    """

    _bundle: ClassVar[str] = "controls"
    _messages: ClassVar = {"run": Run, "stop": Stop, "dismiss": Dismiss}
    _editable: ClassVar[frozenset[str]] = frozenset(
        {"source", "target", "seed", "steps", "guidance", "source_from", "source_seed"}
    )

    model_name = t.Unicode("").tag(sync=True)
    scheduler = t.Unicode("").tag(sync=True)
    source = t.Unicode("").tag(sync=True)
    target = t.Unicode("").tag(sync=True)
    seed = t.Int(0, min=0, max=_LARGEST_SEED).tag(sync=True)
    steps = t.Int(20, min=1, max=1000).tag(sync=True)
    guidance = t.Float(4.0, min=0.0, max=100.0).tag(sync=True)
    source_from = t.Int(0, min=0, max=999).tag(sync=True)
    source_seed = t.Int(None, allow_none=True, min=0, max=_LARGEST_SEED).tag(sync=True)
    can_prompt = t.Bool(True).tag(sync=True)
    can_guide = t.Bool(True).tag(sync=True)
    can_step = t.Bool(True).tag(sync=True)
    status = t.Enum(["idle", "running", "stopping", "error", "done"], "idle").tag(sync=True)
    progress = t.Dict().tag(sync=True)
    preview = t.Bytes(b"").tag(sync=True)
    error = t.Dict().tag(sync=True)

    def __repr__(self) -> str:
        prompts = f"source={self.source!r}, target={self.target!r}, " if self.can_prompt else ""
        return f"RunControls({prompts}seed={self.seed}, steps={self.steps})"

    def fallback_html(self) -> str:
        """The settings as a table."""
        return table(
            [
                ("model", self.model_name),
                ("scheduler", self.scheduler),
                *([("source", self.source)] if self.can_prompt else []),
                *([("source from step", self.source_from)] if self.can_prompt else []),
                *([] if self.source_seed is None else [("source seed", self.source_seed)]),
                *([("target", self.target)] if self.can_prompt else []),
                ("seed", self.seed),
                ("steps", self.steps if self.can_step else "its own"),
                ("guidance", self.guidance if self.can_guide else "none"),
            ]
        )
