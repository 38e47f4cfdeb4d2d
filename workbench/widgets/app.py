"""`Workbench`: linked views over two runs of one model and the patches between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from workbench.errors import BusyError, InputError, RunStopped, UnknownNameError, WorkbenchError, nearest
from workbench.experiments.experiment import Experiment
from workbench.experiments.exporting import FORMATS, exported, free_path, write
from workbench.experiments.patchmap import Cell
from workbench.experiments.scripts import workbench_code
from workbench.experiments.together import ROWS
from workbench.experiments.windows import WINDOWS
from workbench.jobs.worker import PATIENT, URGENT, Job, Worker
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.models.quiet import quiet_run
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.widgets import layout
from workbench.widgets.code import CodeView
from workbench.widgets.images import ImageStrip
from workbench.widgets.patch_map import PatchMap as PatchMapView
from workbench.widgets.screen import Screen
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.settings import SETTINGS, Settings
from workbench.widgets.stage import Pair, Stage
from workbench.widgets.views import component_tree

_GROUP_SECONDS = 4.0
"""About how long a run may take that a click on the map waits for, in runs of one sample."""


class Workbench:
    """The app: two prompts, one model, and what happens when an activation goes from one run to the other.

    Every view is an attribute and works alone: ``controls``, ``tree``, ``scrubber``, ``map``,
    ``images``, ``code``. Everything a click does is a method too: `run`, `stop`, `patch`, `fill`,
    `export`. Runs happen in a worker thread, so the kernel stays free.

    Args:
        model: an open `DiffusionModel`, or anything that one opens.
        source: the prompt whose activations are taken; None is "a red circle", or no prompt where the model
            takes none.
        target: the prompt whose run they are put into; None is "a blue circle", likewise.
        seed: noise seed of both runs.
        source_seed: the source's own noise seed. None is ``seed``, and the next one where the model takes no
            prompt, so that there are two runs to compare.
        steps: steps of both runs; None is the pipeline's own default.
        guidance: guidance scale of both; None is the pipeline's own default.
        source_from: the step at which the source leaves the target's run, so that both images have one
            layout; 0 is a source with a run of its own.
        **arguments: further pipeline arguments of both runs, such as ``height`` and ``width``.
    """

    def __init__(
        self,
        model: Any = "shapes-unet",
        *,
        source: str | None = None,
        target: str | None = None,
        seed: int = 0,
        source_seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        source_from: int = 0,
        **arguments: Any,
    ) -> None:
        self.model = model if isinstance(model, DiffusionModel) else DiffusionModel(model)
        self._allow_code = False
        self._stage = Stage(self.model)
        self._worker = Worker("workbench")
        self._pair: Pair | None = None
        self._cell: Cell | None = None
        self._settings = Settings(
            self.model,
            prompts=(source, target),
            seeds=(seed, source_seed),
            steps=steps,
            guidance=guidance,
            source_from=source_from,
            arguments=arguments,
        )
        self.controls = self._settings.controls
        self.tree = component_tree(self.model)
        self.scrubber = StepScrubber()
        self.map = PatchMapView(window="half")
        self.images = ImageStrip()
        self.code = CodeView(
            can_open=True, formats=list(FORMATS), code=workbench_code(self.experiment, self.model)
        )
        self._screen = Screen(
            self._stage, self.controls, self.tree, self.scrubber, self.map, self.images, self.code
        )
        self._listen()
        self._box = layout.arrange(self)

    @classmethod
    def open(
        cls, experiment: Experiment | str | Path, model: Any = None, *, allow_code: bool = False
    ) -> Self:
        """Open the app on an experiment and run it.

        Args:
            experiment: an `Experiment`, or a file of one: JSON, or a script or notebook that was exported.
            model: the model; None opens the one the experiment names.
            allow_code: whether to import what it names as modules of one's own, which may run anything.

        Raises:
            InputError: the file is no experiment, or of other weights.
        """
        wanted = experiment if isinstance(experiment, Experiment) else Experiment.load(experiment)
        bench = cls(wanted.open() if model is None else model, source=wanted.source, target=wanted.target)
        bench.load(wanted, allow_code=allow_code)
        return bench

    @property
    def experiment(self) -> Experiment:
        """What is on screen, as data.

        Raises:
            InputError: the settings make no experiment; the message names the field.
        """
        if self._cell is not None:
            return self._cell.experiment
        return self._pair.experiment if self._pair is not None else self._settings.asked()

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
        self._check_free()
        experiment = self._settings.asked()
        for prompt in (experiment.source, experiment.target):
            words = {} if prompt is None else {"prompt": prompt}
            checks.check(self.model.pipeline, {**words, **experiment.settings()})
        self._worker.stop()
        self._screen.say("running", forget=True)
        return self._submit("run", lambda job: self._run_pair(job, experiment))

    def load(self, experiment: Experiment | str | Path, *, allow_code: bool = False) -> Job:
        """Put an experiment on screen and run it; returns at once, ``.result(timeout)`` waits.

        Args:
            experiment: of this app's model: an `Experiment`, or a file of one.
            allow_code: whether to import what it names as modules of one's own, which may run anything.

        Raises:
            BusyError: a run is going on.
            InputError: the file is no experiment, or of another model.
        """
        wanted = experiment if isinstance(experiment, Experiment) else Experiment.load(experiment)
        if wanted.model != self.model.reference and wanted.model and self.model.reference:
            raise InputError(
                f"The experiment is of {wanted.model!r}, and this app shows {self.model.reference!r}. Open "
                "an app of its own: Workbench.open(…)."
            )
        self._check_free()
        self._settings.show(wanted)
        self.code.status = ""
        self._worker.stop()
        self._screen.say("running", forget=True)
        return self._submit("run", lambda job: self._run_experiment(job, wanted, allow_code))

    def stop(self) -> None:
        """Stop whatever runs before its next denoiser call; what has been computed stays."""
        if self._worker.busy:
            self._screen.say("stopping")
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
        self._screen.say("running", forget=True)
        return self._submit("patch", lambda job: self._show_cell(job, pair, wanted, step))

    def fill(self) -> list[Job]:
        """Compute every cell of the map not computed yet, between whatever else is asked for.

        Cells that begin at one step go together where runs are quick: their values are within rounding those
        of runs of their own, and a click on a cell, which waits for what is being computed, does not wait
        long. A cell that is clicked is a run of its own.
        """
        pair = self._need_pair()
        groups = pair.map.groups(max(1, min(ROWS, int(_GROUP_SECONDS / max(pair.seconds, 1e-3)))))
        self.map.status, total, done = "running", sum(map(len, groups)), 0
        jobs = []
        for cells in groups:
            done += len(cells)
            jobs.append(self._submit("map", self._filling(pair, cells, done, total), PATIENT))
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
            self._screen.draw_map(self._pair)

    def export(self, format: str = "standalone", path: str | Path | None = None) -> Path:
        """Write what is on screen to a file.

        Args:
            format: ``"standalone"`` (diffusers and torch alone), ``"workbench"``, ``"notebook"`` or
                ``"experiment"`` (JSON). `load` opens each of them again.
            path: where; None is a name that is free in the working directory.

        Returns:
            The file's path.
        """
        if format not in FORMATS:
            raise UnknownNameError(f"No format {format!r}.{nearest(format, FORMATS)}")
        work = self._exporting(format, free_path(format) if path is None else Path(path))
        # A standalone script may need a run of the model, whose runs are the worker's.
        return self._submit("export", work).result() if format == "standalone" else work(None)

    def _exporting(self, format: str, path: Path) -> Callable[[Job | None], Path]:
        experiment = self.experiment
        pair = self._need_pair() if format == "standalone" else None
        runs = None if pair is None else (pair.source, pair.target)

        def work(_: Job | None) -> Path:
            text = exported(
                experiment, format, self.model, runs=runs, allow_code=self._allow_code, suffix=path.suffix
            )
            self.code.status = f"saved to {write(text, path)}"
            return path

        return work

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
        self.controls.on("dismiss", lambda _: self._screen.say(self.controls.status, forget=True))
        self.map.on("cell", self._guarded(lambda asked: self._cell_clicked(asked.row, asked.column)))
        self.map.on("fill", self._guarded(lambda _: self.fill()))
        self.map.on("stop", lambda _: self.stop())
        self.map.on("window", self._guarded(lambda asked: self.set_window(asked.value)))
        self.code.on("open", self._guarded(lambda asked: self.load(Experiment.read(asked.text, asked.name))))
        self.code.on("export", self._guarded(lambda asked: self._export_clicked(asked.format)))
        self.controls.observe(lambda _: self._settings_changed(), list(SETTINGS))

    def _guarded(self, act: Callable[[Any], Any]) -> Callable[[Any], None]:
        """Show an error of ours in the app instead of losing it in a log."""

        def handle(asked: Any) -> None:
            try:
                act(asked)
            except WorkbenchError as error:
                self._screen.say(self.controls.status, error)

        return handle

    def _settings_changed(self) -> None:
        try:
            self._screen.draw_code(self.experiment)
        except InputError:
            return

    def _cell_clicked(self, row: int, column: int) -> None:
        self.patch(self.map.sites[row], column)

    def _export_clicked(self, format: str) -> None:
        work = self._exporting(format, free_path(format))
        if format == "standalone":
            self._submit("export", work)
        else:
            work(None)

    # What the worker does. It is the only thread that writes to the views while it runs.

    def _submit(self, label: str, work: Callable[[Job], Any], priority: int = URGENT) -> Job:
        def work_quietly(job: Job) -> Any:
            with quiet_run(self.model.pipeline):
                return work(job)

        job = Job(label, work_quietly, self._screen.follow(self._size), priority)
        job.when_done(self._ended)
        return self._worker.submit(job)

    def _run_pair(self, job: Job, experiment: Experiment) -> Pair:
        pair = self._stage.run_pair(experiment, self.map.window, job)
        first, self._pair, self._cell = self._pair is None, pair, None
        self.map.selected = []
        if first:
            self.scrubber.step = pair.target.ledger.steps - 1
        self._screen.draw(pair, None)
        self._submit("noise floor", lambda later: self._measure(later, pair), PATIENT)
        return pair

    def _run_experiment(self, job: Job, experiment: Experiment, allow_code: bool) -> Pair:
        experiment.check(self.model, allow_code=allow_code)
        self._stage.sample_as(experiment)
        pair, self._allow_code = self._run_pair(job, experiment), allow_code
        self._settings.keep(experiment)
        found = None if experiment.forks else pair.map.find(experiment.interventions)
        if found is not None:
            window, row, column = found
            self.set_window(window)
            self._show_cell(job, pair, pair.map.sites[row], column)
            return pair
        job.label, source, target = "patched", pair.source, pair.target
        changed = experiment.patch(source, target, listener=job, allow_code=allow_code)
        branches = experiment.branches(source, target, changed, listener=job, allow_code=allow_code)
        if changed is not None or branches:
            self._cell = Cell.of(experiment, changed or target, (source, target), branches)
            self._screen.draw_cell(pair, self._cell)
        return pair

    def _measure(self, job: Job, pair: Pair) -> None:
        pair.floor = self._stage.measure_floor(pair, job)
        self.map.noise_floor = abs(pair.floor[0])
        if pair is self._pair:
            self._screen.draw_images(pair, self._cell)

    def _show_cell(self, job: Job, pair: Pair, site: Site, column: int) -> Cell:
        if pair is not self._pair:
            raise RunStopped("The runs that this patch was asked for are no longer on screen.")
        added = site not in pair.map.sites
        if added:
            pair.map.sites.append(site)
            self._screen.draw_map(pair)
        row = pair.map.sites.index(site)
        self.map.busy = [row, column]
        try:
            cell = pair.map.compute(row, column, job)
            added = False
        finally:
            self.map.busy = []
            if added:
                pair.map.sites.remove(site)
                self._screen.draw_map(pair)
        self._cell = cell
        self.map.selected = [row, column]
        self._screen.draw_cell(pair, cell)
        return cell

    def _filling(
        self, pair: Pair, cells: list[tuple[int, int]], done: int, total: int
    ) -> Callable[[Job], None]:
        def fill(job: Job) -> None:
            if pair is not self._pair:
                return
            self.map.busy = list(cells[0])
            try:
                pair.map.estimate(cells, job)
            finally:
                self.map.busy = []
            self.map.progress = {"done": done, "of": total}
            self._screen.draw_map(pair)

        return fill

    def _ended(self, job: Job) -> None:
        error = job.error()
        urgent = job.priority == URGENT
        if isinstance(error, RunStopped):
            self._keep_partial(error.record)
        if error is not None and (urgent or not isinstance(error, RunStopped)):
            self._screen.say("idle" if isinstance(error, RunStopped) else "error", error)
        elif urgent:
            self._screen.say("done" if not job.stopping else "idle")
        if job.label == "map" and not self._worker.waiting("map"):
            self.map.status = "idle"

    def _keep_partial(self, record: object) -> None:
        """Show how far a stopped run came, if there is nothing better to show."""
        if self._pair is None and isinstance(record, Record) and record.ticks:
            self._screen.draw_partial(record)

    def _size(self) -> tuple[int, int] | None:
        """Width and height of the images, once there is one."""
        return None if self._pair is None else self._pair.target.images[0].size

    def _check_free(self) -> None:
        if self._worker.busy:
            raise BusyError("A run is going on. Stop it first, or wait: bench.stop()")

    def _need_pair(self) -> Pair:
        if self._pair is None:
            raise InputError("There are no runs yet to patch between. Run first: bench.run()")
        return self._pair
