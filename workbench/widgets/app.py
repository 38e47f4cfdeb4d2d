"""`Workbench`: linked views over two runs of one model and the patches between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import ValidationError

from workbench.errors import BusyError, InputError, RunStopped, UnknownNameError, WorkbenchError, nearest
from workbench.experiments.experiment import Experiment, defaults
from workbench.experiments.metrics import difference_image
from workbench.experiments.patchmap import Cell
from workbench.experiments.scripts import standalone_code, workbench_code
from workbench.experiments.windows import WINDOWS
from workbench.jobs.worker import PATIENT, URGENT, Job, Worker
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.models.outline import outline
from workbench.models.quiet import quiet_run
from workbench.tracing.clock import Tick
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.widgets import layout
from workbench.widgets.code import CodeView
from workbench.widgets.controls import RunControls
from workbench.widgets.images import ImageStrip
from workbench.widgets.lanes import change_curve, lane, step_rows
from workbench.widgets.overlay import overlay
from workbench.widgets.patch_map import PatchMap as PatchMapView
from workbench.widgets.pictures import png
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.stage import Pair, Stage
from workbench.widgets.views import component_tree

FORMATS = {"standalone": "standalone.py", "workbench": "workbench.py", "experiment": "json"}
"""What Export writes: a script on diffusers and torch alone, one on the workbench, the experiment as data."""


class Workbench:
    """The app: two prompts, one model, and what happens when an activation goes from one run to the other.

    Every view is an attribute and works alone: ``controls``, ``tree``, ``scrubber``, ``map``,
    ``images``, ``code``. Everything a click does is a method too: `run`, `stop`, `patch`, `fill`,
    `export`. Runs happen in a worker thread, so the kernel stays free.

    Args:
        model: an open `DiffusionModel`, or anything that one opens.
        source: the prompt whose activations are taken.
        target: the prompt whose run they are put into.
        seed: noise seed of both runs.
        steps: steps of both runs; None is the pipeline's own default.
        guidance: guidance scale of both; None is the pipeline's own default.
        **arguments: further pipeline arguments of both runs, such as ``height`` and ``width``.
    """

    def __init__(
        self,
        model: Any = "shapes-unet",
        *,
        source: str = "a red circle",
        target: str = "a blue circle",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        **arguments: Any,
    ) -> None:
        self.model = model if isinstance(model, DiffusionModel) else DiffusionModel(model)
        self._arguments = arguments
        self._stage = Stage(self.model)
        self._worker = Worker("workbench")
        self._pair: Pair | None = None
        self._cell: Cell | None = None
        self._shown = 0.0
        own = defaults(self.model)
        guidance = own.get("guidance_scale") if guidance is None else guidance
        self.controls = RunControls(
            model_name=self.model.reference or type(self.model.pipeline).__name__,
            scheduler=type(getattr(self.model.pipeline, "scheduler", None)).__name__.removesuffix(
                "Scheduler"
            ),
            source=source,
            target=target,
            seed=seed,
            steps=own.get("num_inference_steps") or 20 if steps is None else steps,
            guidance=float(guidance or 0.0),
            can_guide="guidance_scale" in own,
        )
        self.tree = component_tree(self.model)
        self.scrubber = StepScrubber()
        self.map = PatchMapView(window="half")
        self.images = ImageStrip()
        self.code = CodeView(formats=list(FORMATS), code=workbench_code(self.experiment))
        self._listen()
        self._box = layout.arrange(self)

    @property
    def experiment(self) -> Experiment:
        """What is on screen, as data.

        Raises:
            InputError: the settings make no experiment; the message names the field.
        """
        if self._cell is not None:
            return self._cell.experiment
        return self._pair.experiment if self._pair is not None else self._asked()

    @property
    def source(self) -> Record | None:
        """The source's run."""
        return None if self._pair is None else self._pair.source

    @property
    def target(self) -> Record | None:
        """The target's run."""
        return None if self._pair is None else self._pair.target

    @property
    def patched(self) -> Record | None:
        """The patched run on screen."""
        return None if self._cell is None else self._cell.record

    def run(self) -> Job:
        """Run source and target; returns at once, ``.result(timeout)`` waits.

        Raises:
            BusyError: a run is going on.
            InputError, UnknownNameError: the settings or prompts cannot be run.
        """
        if self._worker.busy:
            raise BusyError("A run is going on. Stop it first, or wait: bench.stop()")
        experiment = self._asked()
        checks.check(self.model.pipeline, {"prompt": experiment.source, **experiment.settings()})
        checks.check(self.model.pipeline, {"prompt": experiment.target, **experiment.settings()})
        self._worker.stop()
        self._say("running", error={})
        return self._submit("run", lambda job: self._run_pair(job, experiment))

    def stop(self) -> None:
        """Stop whatever runs before its next denoiser call; what has been computed stays."""
        if self._worker.busy:
            self._say("stopping")
        self.map.status = "idle"
        self._worker.stop()

    def patch(self, site: str, step: int, window: str | None = None) -> Job:
        """Patch one cell of the map; returns at once, ``.result(timeout)`` waits.

        Args:
            site: a row of the map; a site that is not one becomes one.
            step: a column.
            window: which steps the cell covers; None keeps the map's.

        Raises:
            InputError: there are no runs to patch between yet, or no such step.
            UnknownNameError: no such site or window.
        """
        pair, wanted = self._need_pair(), Site.parse(site)
        self.model.site(wanted.path)
        if not 0 <= step < pair.map.steps:
            raise InputError(f"The runs have {pair.map.steps} steps, counted from 0; {step} is none of them.")
        if window is not None:
            self.set_window(window)
        self._say("running", error={})
        return self._submit("patch", lambda job: self._show_cell(job, pair, wanted, step))

    def fill(self) -> list[Job]:
        """Compute every cell of the map not computed yet, between whatever else is asked for."""
        pair = self._need_pair()
        cells = pair.map.missing()
        self.map.status, total = "running", len(cells)
        jobs = []
        for done, (row, column) in enumerate(cells):
            work = self._filling(pair, row, column, done, total)
            jobs.append(self._submit("map", work, PATIENT))
        if not jobs:
            self.map.status = "idle"
        return jobs

    def set_window(self, window: str) -> None:
        """Choose which steps a cell of the map covers: see `workbench.experiments.windows`."""
        if window not in WINDOWS:
            raise UnknownNameError(f"No window {window!r}.{nearest(window, WINDOWS)}")
        self.map.window = window
        if self._pair is not None:
            self._pair.map.window = window
            self._draw_map(self._pair)

    def export(self, format: str = "standalone", path: str | Path | None = None) -> Path:
        """Write what is on screen to a file.

        Args:
            format: ``"standalone"`` (diffusers and torch alone), ``"workbench"`` or ``"experiment"`` (JSON).
            path: where; None is a name that is free in the working directory.

        Returns:
            The file's path.
        """
        if format not in FORMATS:
            raise UnknownNameError(f"No format {format!r}.{nearest(format, FORMATS)}")
        written = _free_path(FORMATS[format]) if path is None else Path(path)
        try:
            if format == "experiment":
                return self.experiment.save(written)
            written.write_text(self._script(format), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{written} cannot be written: {error.strerror or error}") from error
        return written

    def _script(self, format: str) -> str:
        if format == "workbench":
            return workbench_code(self.experiment)
        pair = self._need_pair()
        return standalone_code(self.experiment, pair.source, pair.target)

    def close(self) -> None:
        """Stop what runs, end the worker and let go of the views."""
        self._worker.close()
        for view in layout.views(self):
            view.close()
        self._box.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self._box._repr_mimebundle_(**options)

    # What the front end asks for. Handlers run in the kernel's threads: they check and enqueue.

    def _listen(self) -> None:
        self.controls.on("run", self._guarded(lambda _: self.run()))
        self.controls.on("stop", lambda _: self.stop())
        self.controls.on("dismiss", lambda _: self._say(self.controls.status, error={}))
        self.map.on("cell", self._guarded(lambda asked: self._cell_clicked(asked.row, asked.column)))
        self.map.on("fill", self._guarded(lambda _: self.fill()))
        self.map.on("stop", lambda _: self.stop())
        self.map.on("window", self._guarded(lambda asked: self.set_window(asked.value)))
        self.code.on("export", self._guarded(lambda asked: self._export_clicked(asked.format)))
        for name in ("source", "target", "seed", "steps", "guidance"):
            self.controls.observe(lambda _: self._draw_code(), name)

    def _guarded(self, act: Callable[[Any], Any]) -> Callable[[Any], None]:
        """Show an error of ours in the app instead of losing it in a log."""

        def handle(asked: Any) -> None:
            try:
                act(asked)
            except WorkbenchError as error:
                self._say(self.controls.status, error=_spell(error))

        return handle

    def _cell_clicked(self, row: int, column: int) -> None:
        self.patch(self.map.sites[row], column)

    def _export_clicked(self, format: str) -> None:
        self.code.status = f"saved to {self.export(format)}"

    # What the worker does. It is the only thread that writes to the views while it runs.

    def _submit(self, label: str, work: Callable[[Job], Any], priority: int = URGENT) -> Job:
        def work_quietly(job: Job) -> Any:
            with quiet_run(self.model.pipeline):
                return work(job)

        job = Job(label, work_quietly, self._watch(), priority)
        job.when_done(self._ended)
        return self._worker.submit(job)

    def _run_pair(self, job: Job, experiment: Experiment) -> Pair:
        pair = self._stage.run_pair(experiment, self.map.window, job)
        first, self._pair, self._cell = self._pair is None, pair, None
        if first:
            self.scrubber.step = pair.target.ledger.steps - 1
        self._draw_pair(pair)
        self._submit("noise floor", lambda later: self._measure(later, pair), PATIENT)
        return pair

    def _measure(self, job: Job, pair: Pair) -> None:
        pair.floor = self._stage.measure_floor(pair, job)
        self.map.noise_floor = abs(pair.floor[0])
        self._draw_images()

    def _show_cell(self, job: Job, pair: Pair, site: Site, column: int) -> Cell:
        if pair is not self._pair:
            raise RunStopped("The runs that this patch was asked for are no longer on screen.")
        added = site not in pair.map.sites
        if added:
            pair.map.sites.append(site)
            self._draw_map(pair)
        row = pair.map.sites.index(site)
        self.map.busy = [row, column]
        try:
            cell = pair.map.compute(row, column, job)
            added = False
        finally:
            self.map.busy = []
            if added:
                pair.map.sites.remove(site)
                self._draw_map(pair)
        self._cell = cell
        self.map.selected = [row, column]
        self._draw_map(pair)
        self._draw_images()
        self._draw_code()
        self._draw_lanes(pair)
        return cell

    def _filling(self, pair: Pair, row: int, column: int, done: int, total: int) -> Callable[[Job], None]:
        def fill(job: Job) -> None:
            if pair is not self._pair:
                return
            self.map.busy = [row, column]
            try:
                pair.map.compute(row, column, job)
            finally:
                self.map.busy = []
            self.map.progress = {"done": done + 1, "of": total}
            self._draw_map(pair)

        return fill

    def _watch(self) -> Callable[[Job, Tick, torch.Tensor], None]:
        pace = _Pace()

        def watch(job: Job, tick: Tick, _: torch.Tensor) -> None:
            if job.label not in ("source", "target"):
                return
            total = self.controls.steps
            done = tick.step + 1
            pace.see(done)
            self.controls.progress = {
                "label": job.label,
                "step": done,
                "of": total,
                "rate": pace.rate,
                "left": (total - done) / pace.rate if pace.rate else None,
            }
            self._preview(tick)

        return watch

    def _preview(self, tick: Tick) -> None:
        """Show the predicted clean sample, at most 15 times a second and a tenth of the time."""
        pause = max(1 / 15, 10 * self._stage.decoder.seconds)
        if time.monotonic() - self._shown < pause:
            return
        size = self._pair.target.images[0].size if self._pair is not None else None
        image = self._stage.preview(tick.pred_x0, size)
        self._shown = time.monotonic()
        if image is not None:
            self.controls.preview = png(image)

    def _ended(self, job: Job) -> None:
        error = job.error()
        urgent = job.priority == URGENT
        if isinstance(error, RunStopped):
            self._keep_partial(error)
        if error is not None and (urgent or not isinstance(error, RunStopped)):
            self._say("idle" if isinstance(error, RunStopped) else "error", error=_spell(error))
        elif urgent:
            self._say("done" if error is None and not job.stopping else "idle")
        if job.label == "map" and not self._worker.waiting("map"):
            self.map.status = "idle"

    def _keep_partial(self, stopped: RunStopped) -> None:
        """Show how far a stopped run came, if there is nothing better to show."""
        record = stopped.record
        if self._pair is None and isinstance(record, Record) and record.ticks:
            self.scrubber.rows = step_rows(record)[: len(record.ticks)]
            self.scrubber.lanes = [lane("stopped", record, self._stage.decoder)]

    # What the views are given.

    def _say(self, status: str, *, error: dict[str, str] | None = None) -> None:
        with self.controls.hold_sync():
            self.controls.status = status
            if error is not None:
                self.controls.error = error

    def _draw_pair(self, pair: Pair) -> None:
        self.tree.nodes = [node.__dict__ for node in outline(self.model)]
        self.tree.marked = [site.path for site in pair.map.sites]
        self._draw_lanes(pair)
        self._draw_map(pair)
        self._draw_images()
        self._draw_code()

    def _draw_lanes(self, pair: Pair) -> None:
        decoder = self._stage.decoder
        if not pair.lanes:
            pair.lanes = [lane("source", pair.source, decoder), lane("target", pair.target, decoder)]
        patched = [] if self._cell is None else [lane("patched", self._cell.record, decoder)]
        lanes = [*pair.lanes, *patched]
        kinds = [kind for kind in lanes[0]["frames"] if all(kind in each["frames"] for each in lanes)]
        with self.scrubber.hold_sync():
            self.scrubber.rows = step_rows(pair.target)
            self.scrubber.curve = change_curve(pair.target)
            self.scrubber.kinds = kinds
            if kinds and self.scrubber.kind not in kinds:
                self.scrubber.kind = kinds[0]
            self.scrubber.lanes = lanes
            self.scrubber.attention = self._overlay(pair.target)
            self.scrubber.step = min(self.scrubber.step, pair.target.ledger.steps - 1)

    def _overlay(self, record: Record) -> dict[str, Any]:
        if record.attention is None or not hasattr(record.images[0], "size"):
            return {}
        return overlay(record.attention, lane=1, size=record.images[0].size)

    def _draw_map(self, pair: Pair) -> None:
        with self.map.hold_sync():
            self.map.sites = [str(site) for site in pair.map.sites]
            self.map.steps = pair.map.steps
            self.map.values = pair.map.values.tobytes()
            self.map.metric = "towards source"
            self.map.limit = 1.0
            self.map.signed = True
            self.map.source_label = pair.experiment.source
            self.map.target_label = pair.experiment.target
            self.map.noise_floor = None if pair.floor is None else abs(pair.floor[0])

    def _draw_images(self) -> None:
        pair, cell = self._pair, self._cell
        if pair is None:
            return
        cards = [self._card("source", pair.source), self._card("target", pair.target)]
        note = ""
        if cell is not None:
            change = difference_image(cell.image, pair.target.images[0])
            cards.append(self._card("patched", cell.record))
            cards.append({"label": "Δ", "png": png(change), "caption": "patched − target", "badge": ""})
            note = f"towards source {cell.towards:.0%} · difference {cell.difference:.3f}"
            if pair.floor is not None:
                note += f" · another seed: {pair.floor[0]:.0%}, {pair.floor[1]:.3f}"
        with self.images.hold_sync():
            self.images.cards = cards
            self.images.note = note

    def _card(self, label: str, record: Record) -> dict[str, Any]:
        image = record.images[0]
        return {"label": label, "png": png(image), "caption": self._stage.describe(image), "badge": ""}

    def _draw_code(self) -> None:
        try:
            experiment = self.experiment
        except InputError:
            return
        self.code.code = workbench_code(experiment)

    def _asked(self) -> Experiment:
        controls = self.controls
        try:
            return Experiment(
                model=self.model.reference,
                source=controls.source,
                target=controls.target,
                seed=controls.seed,
                num_inference_steps=controls.steps,
                guidance_scale=controls.guidance if controls.can_guide else None,
                arguments=self._arguments,
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(f"{field} = {first.get('input')!r} cannot be used: {first['msg']}.") from error

    def _need_pair(self) -> Pair:
        if self._pair is None:
            raise InputError("There are no runs yet to patch between. Run first: bench.run()")
        return self._pair


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


def _spell(error: BaseException) -> dict[str, str]:
    return {"title": type(error).__name__, "text": str(error)}


def _free_path(ending: str) -> Path:
    name, _, suffix = f"experiment-{ending}".replace("experiment-json", "experiment.json").rpartition(".")
    for number in range(1, 10_000):
        path = Path(f"{name}-{number}.{suffix}")
        if not path.exists():
            return path
    raise InputError("The working directory is full of exported experiments; give export() a path.")
