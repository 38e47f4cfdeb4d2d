"""What the app's views are given of runs, patches and errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.experiments.branching import named
from workbench.experiments.experiment import Experiment
from workbench.experiments.metrics import difference_image
from workbench.experiments.patchmap import Cell
from workbench.experiments.scripts import workbench_code
from workbench.jobs.worker import Job
from workbench.models.outline import outline
from workbench.tracing.clock import Tick
from workbench.tracing.record import Record
from workbench.widgets.code import CodeView
from workbench.widgets.controls import RunControls
from workbench.widgets.images import ImageStrip
from workbench.widgets.lanes import change_curve, lane, step_rows
from workbench.widgets.overlay import overlay
from workbench.widgets.patch_map import PatchMap
from workbench.widgets.pictures import png
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.stage import Pair, Stage
from workbench.widgets.tree import ComponentTree


@dataclass
class Screen:
    """The views of one app; it draws into them and keeps nothing of its own.

    Attributes:
        stage: what ran, and can turn latents into pictures.
    """

    stage: Stage
    controls: RunControls
    tree: ComponentTree
    scrubber: StepScrubber
    map: PatchMap
    images: ImageStrip
    code: CodeView
    _shown: float = field(default=0.0, init=False)

    def say(self, status: str, error: BaseException | None = None, *, forget: bool = False) -> None:
        """Show a status, and an error if there is one; ``forget`` takes an older error away."""
        with self.controls.hold_sync():
            self.controls.status = status
            if error is not None:
                self.controls.error = {"title": type(error).__name__, "text": str(error)}
            elif forget:
                self.controls.error = {}

    def draw(self, pair: Pair, cell: Cell | None) -> None:
        """Show two runs, and a patch between them."""
        self.tree.nodes = [node.__dict__ for node in outline(self.stage.model)]
        self.tree.marked = [site.path for site in pair.map.sites]
        self.draw_cell(pair, cell)

    def draw_cell(self, pair: Pair, cell: Cell | None) -> None:
        """Show a patch between two runs that are on screen already."""
        self.draw_map(pair)
        self.draw_images(pair, cell)
        self.draw_code(pair.experiment if cell is None else cell.experiment)
        self._draw_steps(pair, cell)

    def draw_map(self, pair: Pair) -> None:
        """Show what is known of the patch map."""
        with self.map.hold_sync():
            self.map.sites = [str(site) for site in pair.map.sites]
            self.map.steps = pair.map.steps
            self.map.values = pair.map.values.tobytes()
            self.map.metric = "towards source"
            self.map.limit = 1.0
            self.map.signed = True
            self.map.source_label, self.map.target_label = pair.experiment.labels
            self.map.noise_floor = None if pair.floor is None else abs(pair.floor[0])

    def draw_images(self, pair: Pair, cell: Cell | None) -> None:
        """Show the images, and what the patch did beside what another seed does."""
        cards = [self._card("source", pair.source), self._card("target", pair.target)]
        note = ""
        if cell is not None:
            change = difference_image(cell.image, pair.target.images[0])
            cards.append(self._card("patched", cell.record))
            cards.append({"label": "Δ", "png": png(change), "caption": "patched − target", "badge": ""})
            cards += [self._card(name, run) for name, run in named(cell.branches)]
            note = f"towards source {cell.towards:z.0%} · difference {cell.difference:.3f}"
            if pair.floor is not None:
                note += f" · another seed: {pair.floor[0]:z.0%}, {pair.floor[1]:.3f}"
        with self.images.hold_sync():
            self.images.cards = cards
            self.images.note = note

    def draw_code(self, experiment: Experiment) -> None:
        """Show the code of what is on screen."""
        self.code.code = workbench_code(experiment, self.stage.model)

    def draw_partial(self, record: Record) -> None:
        """Show how far a stopped run came."""
        self.scrubber.rows = step_rows(record)[: len(record.ticks)]
        self.scrubber.lanes = [lane("stopped", record, self.stage.decoder)]

    def follow(self, size: Callable[[], tuple[int, int] | None]) -> Callable[[Job, Tick, torch.Tensor], None]:
        """Return a watcher of a run that shows its progress and what it predicts.

        Args:
            size: tells the ``(width, height)`` of the image to come, None if it is not known.
        """
        pace = _Pace()

        def watch(job: Job, tick: Tick, _: torch.Tensor) -> None:
            if job.label not in ("source", "target"):
                return
            total = self.controls.steps if self.controls.can_step else 0
            done = tick.step + 1
            pace.see(done)
            self.controls.progress = {
                "label": job.label,
                "step": done,
                "of": total,
                "rate": pace.rate,
                "left": (total - done) / pace.rate if pace.rate and total else None,
            }
            self._preview(tick, size())

        return watch

    def _preview(self, tick: Tick, size: tuple[int, int] | None) -> None:
        """Show the predicted clean sample, at most 15 times a second and a tenth of the time."""
        pause = max(1 / 15, 10 * self.stage.decoder.seconds)
        if time.monotonic() - self._shown < pause:
            return
        image = self.stage.preview(tick.pred_x0, size)
        self._shown = time.monotonic()
        if image is not None:
            self.controls.preview = png(image)

    def _draw_steps(self, pair: Pair, cell: Cell | None) -> None:
        decoder = self.stage.decoder
        if not pair.lanes:
            pair.lanes = [lane("source", pair.source, decoder), lane("target", pair.target, decoder)]
        patched = [] if cell is None else [lane("patched", cell.record, decoder)]
        lanes = [*pair.lanes, *patched]
        kinds = [kind for kind in lanes[0]["frames"] if all(kind in each["frames"] for each in lanes)]
        with self.scrubber.hold_sync():
            self.scrubber.rows = step_rows(pair.target)
            self.scrubber.curve = change_curve(pair.target)
            self.scrubber.kinds = kinds
            if kinds and self.scrubber.kind not in kinds:
                self.scrubber.kind = kinds[0]
            self.scrubber.lanes = lanes
            self.scrubber.attention = _attention_of(pair.target)
            self.scrubber.step = min(self.scrubber.step, pair.target.ledger.steps - 1)

    def _card(self, label: str, record: Record) -> dict[str, Any]:
        image = record.images[0]
        return {"label": label, "png": png(image), "caption": self.stage.describe(image), "badge": ""}


def _attention_of(record: Record) -> dict[str, Any]:
    if record.attention is None or not hasattr(record.images[0], "size"):
        return {}
    return overlay(record.attention, lane=1, size=record.images[0].size)


class _Pace:
    """Steps a second since the run's first step."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._first = 0
        self._began = 0.0

    def see(self, done: int) -> None:
        """Note that ``done`` steps are done; a smaller number than before is another run."""
        if self._first == 0 or done <= self._first:
            self._first, self._began, self.rate = done, time.monotonic(), None
        else:
            self.rate = (done - self._first) / (time.monotonic() - self._began)
