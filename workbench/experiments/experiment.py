"""`Experiment`: two runs of a model, and what is put from one into the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from workbench import zoo
from workbench.attention.words import UNKNOWN, find, words_of
from workbench.errors import InputError, UnknownNameError, nearest
from workbench.experiments.branching import Branch, Fork, every_fork, rerun
from workbench.experiments.change import Change, Runs, SiteChange
from workbench.experiments.changes import TurnSpec
from workbench.experiments.inversion import invert
from workbench.experiments.sampler import other_scheduler, put_scheduler, sampling
from workbench.experiments.site_changes import ModuleSpec, PatchSpec
from workbench.experiments.spec import ExperimentSpec
from workbench.experiments.texts import readings
from workbench.interventions.intervention import Intervention
from workbench.models.asked import Captured
from workbench.models.hashing import weights_hash
from workbench.models.model import DiffusionModel
from workbench.tracing.branches import check_branch
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.sites import Site, resolve

if TYPE_CHECKING:
    from workbench.experiments.sweep import Sweep

_NOISE: WeakKeyDictionary[DiffusionModel, dict[Any, Any]] = WeakKeyDictionary()
"""The noise of the last picture of each model, which every run of an experiment begins at."""


_REFERENCES = 32
"""How many runs of other prompts are held at once for those that take from them."""


class Experiment(ExperimentSpec):
    """Two runs of a model and what is put from one into the other: what `ExperimentSpec` says, to be run.

    Example:
        >>> experiment = Experiment(model="shapes-unet", source="a red circle", target="a blue circle",
        ...                         interventions=[{"kind": "patch", "site": "unet.mid_block"}])
        >>> experiment.run().patched.images[0]
    """

    def told(self, model: DiffusionModel, listener: Listener | None = None) -> dict[str, Any]:
        """Return the pipeline arguments that both runs share, with the noise of a picture if there is one.

        Raises:
            InputError: there is no such picture.
            GuardError: the model's sampler cannot be run backwards.
        """
        if self.picture is None:
            return self.settings()
        try:
            with Image.open(Path(self.picture).expanduser()) as opened:
                picture = opened.convert("RGB")
        except (OSError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
            raise InputError(f"picture={self.picture!r} cannot be opened: {error}") from error
        known, settings = _NOISE.setdefault(model, {}), self.settings()
        samplers = [(type(each).__name__, dict(each.config)) for each in model.schedulers.values()]
        key = (picture.tobytes(), repr((self.source, settings, samplers)))
        if key not in known:
            known.clear()
            # Guidance cannot be run backwards well, and is left out on the way there.
            plain = {name: value for name, value in settings.items() if name != "guidance_scale"}
            known[key] = invert(model, picture, self.source, listener=listener, **plain).latents
        return {**settings, "latents": known[key]}

    def export(
        self,
        path: str | Path,
        format: str = "standalone",
        model: DiffusionModel | None = None,
        *,
        allow_code: bool = False,
    ) -> Path:
        """Write the experiment as a script, ``.py``, or a notebook, ``.ipynb``, that makes its image.

        Args:
            path: where to.
            format: ``"standalone"``, on diffusers and torch alone, or ``"workbench"``.
            model: an open model; None opens the one the experiment names, if a standalone script needs it.
            allow_code: whether the script may import what it names as modules of one's own.

        Raises:
            InputError: a script cannot do what the experiment does; the message says what.
            UnknownNameError: no such format.
        """
        from workbench.experiments.exporting import exported, write

        if format not in ("standalone", "workbench"):
            raise UnknownNameError(f"No format {format!r}.{nearest(format, ('standalone', 'workbench'))}")
        text = exported(self, format, model, allow_code=allow_code, suffix=Path(path).suffix)
        return write(text, path)

    def sweep(self, axes: Mapping[str, Iterable[Any]], **asked: Any) -> Sweep:
        """Return a `workbench.Sweep` of the experiment over some axes, which takes the same arguments."""
        from workbench.experiments.sweep import Sweep

        return Sweep(self, axes, **asked)

    def pinned(self, model: DiffusionModel) -> Self:
        """Return the experiment for these very weights, and for the scheduler that the model has.

        With other weights it will not run; the scheduler it brings with it, if that is another than the one
        saved with the model.

        Raises:
            InputError: the scheduler is none that a file can say.
        """
        found = self.sampled(model)
        own = None if found.source_model is None else weights_hash(found.open_source(model))
        return found.model_copy(update={"weights": weights_hash(model), "source_weights": own})

    def sampled(self, model: DiffusionModel) -> Self:
        """Return the experiment with the scheduler that the model has, if it says none and that is not saved.

        Raises:
            InputError: the scheduler is none that a file can say.
        """
        if self.scheduler is not None:
            return self
        return self.model_copy(update={"scheduler": other_scheduler(model)})

    def run(
        self,
        model: DiffusionModel | None = None,
        *,
        capture: tuple[Captured, ...] = (),
        listener: Listener | None = None,
        allow_code: bool = False,
    ) -> Outcome:
        """Run source, target and, if anything is changed, the changed target and its branches.

        Args:
            model: an open model, which has the experiment's scheduler meanwhile; None opens the one the
                experiment names.
            capture: further sites and probes to keep, in source and target.
            listener: told how the runs go on.
            allow_code: whether to import what it names as modules of one's own, which may run anything.

        Raises:
            InputError: it does not fit the model, or imports something without being allowed to.
        """
        model = self.open() if model is None else model
        with sampling(model, self.scheduler):
            self.check(model, allow_code=allow_code)
            kept = (*self.captures(), *capture)
            target = self.run_target(model, capture=capture if self.source_model else kept, listener=listener)
            source = self.run_source(model, target, capture=kept, listener=listener)
            changed = self.patch(source, target, listener=listener, allow_code=allow_code)
            branches = self.branches(source, target, changed, listener=listener, allow_code=allow_code)
        return Outcome(self, source, target, changed, branches)

    def open(self) -> DiffusionModel:
        """Open the model that the experiment names, with its scheduler.

        Raises:
            InputError: diffusers has no such scheduler, or the model has no place for it.
        """
        pinned: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        model = DiffusionModel(self.model, **pinned)
        put_scheduler(model, self.scheduler)
        return model

    def open_source(self, model: DiffusionModel) -> DiffusionModel:
        """Return the source's model: another one, in the dtype and on the device of the target's, or that.

        Raises:
            InputError: it has other weights than the experiment says.
        """
        if self.source_model is None:
            return model
        parts = [weight for part in model.denoisers.values() for weight in part.parameters()]
        weight = next((each for each in parts if each.is_floating_point()), torch.empty(0))
        told: dict[str, Any] = {} if weight.dtype == torch.float32 else {"torch_dtype": weight.dtype}
        other = DiffusionModel(self.source_model, **told)
        if weight.device.type not in ("cpu", "meta"):
            other.to(weight.device)
        _check_hash(other, self.source_weights, "source_weights")
        return other

    def check_weights(self, model: DiffusionModel) -> None:
        """Refuse a model with other weights than the experiment is of, if it says which.

        Raises:
            InputError: with both hashes.
        """
        _check_hash(model, self.weights, "weights")

    def check(self, model: DiffusionModel, *, allow_code: bool = False) -> None:
        """Refuse, before anything is run, what does not fit a model.

        Raises:
            InputError: it has other weights; the runs have no such step; or something would be imported
                that nobody said may be.
            UnknownNameError: it has no such site.
        """
        self.check_weights(model)
        with sampling(model, self.scheduler):
            pass
        for each in self.every_change():
            if isinstance(each, ModuleSpec):
                each.check_trusted(allow_code)
            if isinstance(each, SiteChange):
                resolve(model.components, Site.parse(each.site).path)
            if isinstance(each, Change):
                given = getattr(model.pipeline, "branches", None)
                check_branch(each.branch, model.denoisers.values(), given)
        if self.num_inference_steps is not None:
            self.check_steps(self.num_inference_steps)

    def check_steps(self, steps: int) -> None:
        """Refuse what is at a step that runs of so many have not.

        Raises:
            InputError: with the step.
        """
        for each in self.every_change():
            if isinstance(each, Change):
                each.act(steps)
            if isinstance(each, TurnSpec):
                each.check(steps)
            early = each.from_step if isinstance(each, PatchSpec) else None
            if early is not None and not -steps <= early < steps:
                raise InputError(
                    f"The runs have {steps} steps, counted from 0; from_step={early} is none of them."
                )
        for fork in every_fork(self.forks):
            fork.check(steps)
            fork.acting(steps)

    def run_target(
        self, model: DiffusionModel, *, capture: tuple[Captured, ...] = (), listener: Listener | None = None
    ) -> Record:
        """Run the target alone."""
        with sampling(model, self.scheduler):
            settings = {**self.told(model, listener), "seed": self.seed, "listener": listener}
            return model.record(self.target, capture=capture, **settings)

    def run_source(
        self,
        model: DiffusionModel,
        target: Record,
        *,
        capture: tuple[Captured, ...] = (),
        listener: Listener | None = None,
    ) -> Record:
        """Run the source: from its noise, or from where it leaves the target's run.

        Raises:
            InputError: the target's run has no such step to leave it at.
        """
        if self.source_from:
            if self.source_from >= target.ledger.steps:
                raise InputError(
                    f"source_from={self.source_from}: the runs have {target.ledger.steps} steps, counted "
                    "from 0, so the source would never leave the target's run."
                )
            with sampling(model, self.scheduler):
                return target.fork(self.source_from, prompt=self.source, capture=capture, listener=listener)
        seed, other = self.seed if self.source_seed is None else self.source_seed, self.open_source(model)
        with sampling(model, self.scheduler):
            settings = {**self.told(model, listener), "seed": seed, "listener": listener}
            return other.record(self.source, capture=capture, **settings)

    def patch(
        self,
        source: Record,
        target: Record,
        *,
        listener: Listener | None = None,
        allow_code: bool = False,
    ) -> Record | None:
        """Return the changed run, computed only from the first changed step on; None if nothing is."""
        if not self.interventions:
            return None
        acting, runs = self.acting(target.ledger.steps), self.runs(source, target, allow_code=allow_code)
        with self.sampling_as(target):
            return rerun(target, acting, runs, listener=listener)

    def bound(
        self, source: Record, target: Record, *, allow_code: bool = False, runs: Runs | None = None
    ) -> list[Intervention]:
        """Return the interventions with the runs they need, without turns.

        Args:
            source: the source's run.
            target: the target's run.
            allow_code: whether to import modules of one's own.
            runs: what they take from, if several experiments share it; None is of these runs alone.
        """
        runs = self.runs(source, target, allow_code=allow_code) if runs is None else runs
        acting = self.acting(target.ledger.steps)
        return [each.bind(runs) for each in acting if not isinstance(each, TurnSpec)]

    def places(
        self, run: Record, words: Sequence[str], prompt: Any = None
    ) -> Callable[[int], tuple[int, ...]]:
        """Return where words of a prompt stand, once the length of the sequence is known.

        Args:
            run: whose prompt and arguments it is.
            words: of the prompt.
            prompt: another in place of the run's.

        Raises:
            InputError: the run has no prompt; and, of a length, that the text is not so long.
        """
        prompt, model = run.spec.arguments.get("prompt") if prompt is None else prompt, run.model
        if not isinstance(prompt, str) or not isinstance(model, DiffusionModel):
            raise InputError(f"words={list(words)} are of a prompt, and this run has none.")
        read = readings(model, prompt, run.spec.arguments)

        def found(length: int) -> tuple[int, ...]:
            known = words_of(read, length, prompt)
            if all(word.text == UNKNOWN for word in known):
                raise InputError(
                    f"words={list(words)} choose places of the prompt's text, and a sequence of {length} "
                    "places is not that text: this site does not carry it. Take one that does, such as a "
                    "cross-attention's '….attn2.to_v', or give tokens."
                )
            return tuple(column for word in words for column in find(known, word).columns)

        return found

    def branches(
        self,
        source: Record,
        target: Record,
        changed: Record | None,
        *,
        listener: Listener | None = None,
        allow_code: bool = False,
    ) -> tuple[Branch, ...]:
        """Return the runs of the forks, each computed only from its step on."""
        runs = self.runs(source, target, allow_code=allow_code)

        def grown(forks: Sequence[Fork], stem: Record, said: Sequence[Any]) -> tuple[Branch, ...]:
            found = []
            for fork in forks:
                acting = fork.acting(target.ledger.steps)
                before = list(zip(said, stem.spec.interventions, strict=True))
                record = rerun(stem, acting, runs, before, listener=listener, start=fork.step)
                further = [each for each in acting if isinstance(each, Change)]
                found.append(Branch(fork, record, grown(fork.forks, record, [*said, *further])))
            return tuple(found)

        said = [each for each in self.acting(target.ledger.steps) if isinstance(each, Change)]
        with self.sampling_as(target):
            return grown(self.forks, *((target, []) if changed is None else (changed, said)))

    def sampling_as(self, run: Record) -> AbstractContextManager[None]:
        """Let the model of a run have the experiment's scheduler for a while."""
        return sampling(run.model, self.scheduler) if isinstance(run.model, DiffusionModel) else nullcontext()

    def runs(self, source: Record, target: Record, *, allow_code: bool = False) -> Runs:
        """Return the runs that the experiment's interventions are bound to."""
        return _Runs(self, source, target, allow_code)


@dataclass(frozen=True)
class Outcome:
    """What an experiment's runs left behind; ``patched`` is None where nothing was changed."""

    experiment: Experiment
    source: Record
    target: Record
    patched: Record | None
    branches: tuple[Branch, ...] = ()


class _Runs:
    """The runs that interventions of an experiment need."""

    def __init__(self, experiment: Experiment, source: Record, target: Record, allow_code: bool) -> None:
        self.experiment = experiment
        self.allow_code = allow_code
        self.source = source
        self.target = target
        self._prompt: Any = None
        self._plain: dict[tuple[str | None, tuple[str, ...]], Record] = {}

    def plain(self, prompt: str | None, sites: Sequence[str]) -> Record:
        key = (prompt, tuple(sites))
        if key not in self._plain:
            model = self.target.model
            assert isinstance(model, DiffusionModel)
            settings = {**self.experiment.told(model), "seed": self.experiment.seed}
            if len(self._plain) >= _REFERENCES:
                del self._plain[next(iter(self._plain))]
            with sampling(model, self.experiment.scheduler):
                self._plain[key] = model.record(prompt, capture=list(sites), **settings)
        return self._plain[key]

    def of(self, prompt: Any) -> Runs:
        other = copy(self)
        other._prompt = prompt
        return other

    def places(
        self, words: Sequence[str], *, source: bool = False, prompt: str | None = None
    ) -> Callable[[int], tuple[int, ...]]:
        if source:
            return self.experiment.places(self.source, words)
        return self.experiment.places(self.target, words, self._prompt if prompt is None else prompt)


def _check_hash(model: DiffusionModel, wanted: str | None, field: str) -> None:
    if wanted is not None and (found := weights_hash(model)) != wanted:
        raise InputError(
            f"The experiment is of weights {wanted[:19]}…, and {model.reference or 'this model'} has "
            f"{found[:19]}…. Open those it is of, or take the model as it is: "
            f"experiment.model_copy(update={{{field!r}: None}})."
        )


def defaults(model: DiffusionModel) -> dict[str, Any]:
    """Return the steps and guidance a model is at its best with: the zoo's, or the pipeline's own.

    What it takes without a default is None.
    """
    if model.reference in zoo.models():
        return zoo.settings(model.reference)
    parameters = inspect.signature(model.pipeline).parameters
    names = ("num_inference_steps", "guidance_scale")
    own = {name: parameters[name].default for name in names if name in parameters}
    return {name: None if value is inspect.Parameter.empty else value for name, value in own.items()}
