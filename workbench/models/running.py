"""A model's runs: traced, recorded, forked, and one at a time."""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from workbench.attention import heads as _heads  # noqa: F401  makes the ports known
from workbench.attention import kernel as _kernel  # noqa: F401  likewise
from workbench.errors import BusyError, InputError
from workbench.interventions.intervention import Intervention
from workbench.models import arguments as checks
from workbench.models import asked
from workbench.models.asked import Captured
from workbench.models.loop import Block, Loop, unreached
from workbench.models.shapes import Shapes
from workbench.tracing.by_hand import check_repeatable, is_mark
from workbench.tracing.gradient import Differentiation, Gradient, Values
from workbench.tracing.graph import Graph
from workbench.tracing.record import Record, RunSpec
from workbench.tracing.replay import Replay
from workbench.tracing.seeds import Seed, generators, normal, set_apart, single
from workbench.tracing.session import Listener, Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps
from workbench.tracing.system import System
from workbench.tracing.trace import Trace

_OCCUPIED: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
"""Whose run each denoiser is in now; several models may have one between them."""


class Running(ABC):
    """Methods of a model that run it.

    Attributes:
        shapes: what each module returned in the first recorded run, as text by path.
        managers: by component, what spreads it over the ranks; empty where nothing is spread.
    """

    _loaded: Any
    _reference: str

    def __init__(self) -> None:
        self.shapes: dict[str, str] = {}
        self.managers: dict[str, Any] = {}
        self._running: dict[str, Session] = {}
        self._trace: Trace | None = None
        self._together: AbstractContextManager[Any] = nullcontext()
        self._parts: dict[str, weakref.ref[nn.Module]] = {}

    @property
    @abstractmethod
    def pipeline(self) -> Any:
        """The pipeline, loaded."""

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The pipeline's parts by name, those that are there."""

    @abstractmethod
    def dispatch(self) -> None:
        """Load the weights now, if they are not loaded."""

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The UNet or transformer, or both of a pipeline that has two."""
        return self._system().denoisers

    @property
    def schedulers(self) -> dict[str, Any]:
        """What steps latents along a list of timesteps."""
        return self._system().schedulers

    def generate(
        self,
        prompt: Any = None,
        *,
        seed: Seed = None,
        graph: Steps | Literal[False] = False,
        **arguments: Any,
    ) -> Trace:
        """Open a traced run; inside the ``with`` block values are read and replaced as they pass.

        Args:
            prompt: what the pipeline takes as its prompt; None for pipelines without one.
            seed: noise seed, see `record`.
            graph: the steps through which autograd's graph is kept, for ``run.gradient``; None is every
                step. All that passes in them stays in memory.
            **arguments: the pipeline's own.
        """
        spec, call, rows = self._plan(prompt, seed, arguments)
        probes = () if graph is False else (Graph(graph, recompute=False),)
        session = Session(self._system(), call, spec, rows=rows, probes=probes)
        return Trace(session, begin=partial(self._begin, session), end=self._end, finish=self._finish)

    def trace(self, prompt: Any = None, *, seed: Seed = None, **arguments: Any) -> Trace:
        """Open a traced run of one step, unless ``num_inference_steps`` says otherwise."""
        return self.generate(prompt, seed=seed, **self._briefly(arguments))

    def record(
        self,
        prompt: Any = None,
        *,
        seed: Seed = None,
        capture: Sequence[Captured] = (),
        interventions: Sequence[Intervention] = (),
        listener: Listener | None = None,
        **arguments: Any,
    ) -> Record:
        """Run once and return what the run left behind.

        Args:
            prompt: what the pipeline takes as its prompt; None for pipelines without one.
            seed: noise seed: one for all prompts (paired noise), or a list with one a sample; None
                leaves the noise to the pipeline, which draws on every rank of a sharded model what it does
                on the first.
            capture: sites to keep (``"unet.mid_block"``), and probes such as ``wb.Attention()``.
            interventions: changes to make, applied in order; a captured value is the changed one.
            listener: told of each call and tick; an exception it raises ends the run.
            **arguments: the pipeline's own, unchanged.

        Raises:
            BusyError: the model is already running.
            UnknownNameError, InputError: an argument, site, port, step or branch that does not fit.
        """
        spec, call, rows = self._plan(prompt, seed, arguments)
        seen = Shapes()
        probes = asked.listed(capture) if self.shapes else [*asked.listed(capture), seen]
        record = self._run(spec, call, rows, probes, interventions, listener, replay=None)
        self.shapes = self.shapes or seen.text()
        return record

    def __call__(self, prompt: Any = None, *, seed: Seed = None, **arguments: Any) -> Any:
        """Run one step, unless told otherwise, and return the pipeline's output."""
        return self.record(prompt, seed=seed, **self._briefly(arguments)).output

    def gradient(
        self,
        prompt: Any = None,
        *,
        of: Callable[[torch.Tensor], torch.Tensor],
        wrt: str | Site | Sequence[str | Site],
        steps: Steps = None,
        result: str | Site | None = None,
        result_step: int | None = None,
        seed: Seed = None,
        interventions: Sequence[Intervention] = (),
        **arguments: Any,
    ) -> Gradient:
        """Run once and return the derivative of a number of the result with respect to activations.

        The graph is kept from the first chosen step to the result; each call of the denoiser is computed
        again on the way back, so that memory grows by a few latents a step.

        Args:
            prompt: what the pipeline takes as its prompt; None for pipelines without one.
            of: makes the number of the result: ``lambda image: image[:, 0].mean()``.
            wrt: the sites of the activations, one or several.
            steps: in which steps; None is every step.
            result: what ``of`` is given: a site, ``"latents"``, ``"noise_pred"`` or ``"pred_x0"``; None is
                what the decoder makes of the latents, for an image ``(batch, 3, height, width)`` from -1 to
                1, or the latents where there is no decoder. Of several that pass, the last.
            result_step: take the result of this step, and end the run with it; None is the whole run.
            seed: noise seed, see `record`.
            interventions: changes to make; a derivative is taken by the changed activation.
            **arguments: the pipeline's own, unchanged.

        Raises:
            InputError: ``of`` returns no number that depends on the result.
            OutOfOrderError: the result, or no activation, passed.
        """
        spec, call, rows = self._plan(prompt, seed, arguments)
        taps = Values([wrt] if isinstance(wrt, (str, Site)) else list(wrt), steps)
        probe = Differentiation(
            of, taps=taps, result=result or self._default_result(), result_step=result_step
        )
        record = self._run(spec, call, rows, [probe], interventions, None, replay=None)
        return Gradient(probe.value, record, taps.derivatives)

    def trace_loop(
        self,
        prompt: Any = None,
        *,
        components: Mapping[str, Any] | None = None,
        capture: Sequence[Captured] = (),
        interventions: Sequence[Intervention] = (),
        listener: Listener | None = None,
        samples: int | None = None,
        branches: Sequence[str] | None = None,
    ) -> Block:
        """Watch and edit a denoising loop that stands in the ``with`` block itself.

        What is wanted is said here: inside the block your code is the run. Such a run cannot be forked; a
        loop in a function can, see `workbench.trace_loop`.

        Args:
            prompt: the words that the loop uses, so that it is known which branch has them.
            components: parts that the loop uses in place of the model's: ``{"scheduler": scheduler}``.
            capture: as in `record`.
            interventions: as in `record`.
            listener: as in `record`.
            samples: how many samples the loop makes at once; None is one for each prompt.
            branches: its guidance branches in their order, ``("uncond", "cond")``; None tells them by the
                words, if the block encodes them. What cannot be told is ``guide0``, ``guide1``.

        Raises:
            BusyError: the model is already running.
            OutOfOrderError: after the block, if the denoiser was not called or the scheduler not stepped.

        Example:
            >>> with model.trace_loop(capture=["unet.mid_block"]) as run:
            ...     for t in scheduler.timesteps:
            ...         noise = model.pipeline.unet(sample, t, words).sample
            ...         sample = scheduler.step(noise, t, sample).prev_sample
            >>> run.record.latents
        """
        self.dispatch()
        self._take_in_parts()
        sites = [Site.parse(each) for each in asked.listed(capture) if isinstance(each, (str, Site))]
        probes = [each for each in capture if not isinstance(each, (str, Site))]
        edits = asked.changes(interventions)
        spec = RunSpec(
            model=self._reference,
            arguments={} if prompt is None else {"prompt": prompt},
            block=True,
            capture=asked.captured(capture),
            interventions=tuple(edits),
        )
        session = Session(
            System(
                {**self.components, **(components or {})},
                unreached,
                branches=None if branches is None else tuple(branches),
                by_hand=True,
            ),
            spec.arguments,
            spec,
            rows=samples or checks.count_prompts(spec.arguments),
            edits=edits,
            capture=sites,
            probes=probes,
            listener=listener,
        )
        return Block(session, begin=self._occupy, end=self._end, finish=self._finish)

    def _default_result(self) -> str:
        return "vae.decode" if callable(getattr(self.components.get("vae"), "decode", None)) else "latents"

    def _run(
        self,
        spec: RunSpec,
        call: Mapping[str, Any],
        rows: int | None,
        capture: Sequence[Captured],
        interventions: Sequence[Intervention],
        listener: Listener | None,
        replay: Replay | None,
    ) -> Record:
        sites = [Site.parse(each) for each in capture if isinstance(each, (str, Site))]
        probes = [each for each in capture if not isinstance(each, (str, Site))]
        edits = asked.changes(interventions)
        spec = spec.model_copy(
            update={"capture": asked.captured(capture), "interventions": (*spec.interventions, *edits)}
        )
        session = Session(
            self._system(),
            call,
            spec,
            rows=rows,
            edits=edits,
            capture=sites,
            probes=probes,
            replay=replay,
            listener=listener,
        )
        return self._perform(session)

    def _perform(self, session: Session) -> Record:
        try:
            try:
                self._occupy(session)
                with session.replay.global_noise() if session.replay is not None else nullcontext():
                    record = session.run()
            finally:
                self._end(session)
        finally:
            self._end(session)
        session.let_go()
        self._finish(record)
        return record

    def fork(self, record: Record, step: int, changes: Mapping[str, Any]) -> Record:
        """Run ``record`` again from ``step`` with ``changes``; called by `Record.fork`."""
        changes = dict(changes)
        old = record.spec
        if old.block:
            raise InputError(
                "This run was a block of your own code, which cannot be run again. Put the loop into a "
                "function: model = wb.trace_loop(function, components={…}); model.record(…).fork(…)."
            )
        now = self._samplers()
        for name, was in record.samplers.items():
            if now.get(name) != was:
                raise InputError(
                    f"The model's {name} is another than that of this run, which was {was}. A fork repeats "
                    f"the run's steps: put that back (model.pipeline.{name} = …) or record anew."
                )
        capture = asked.listed(changes.pop("capture", old.capture))
        marks = tuple(each for each in old.interventions if is_mark(each))
        if "interventions" not in changes:
            check_repeatable(marks, step)
        told = changes.pop("interventions", old.interventions)
        interventions = [each for each in told if not is_mark(each)]
        listener = changes.pop("listener", None)
        if "seed" in changes:
            raise InputError("A fork keeps the noise of its run; to change the seed, record anew.")
        for name in ("num_inference_steps", "timesteps", "sigmas"):
            if changes.get(name, old.arguments.get(name)) != old.arguments.get(name):
                raise InputError(f"A fork keeps the steps of its run; to change {name}, record anew.")
        arguments = {**set_apart(old.arguments), **changes}
        spec, call, rows = self._plan(arguments.pop("prompt", None), old.seed, arguments)
        kept = tuple(each for each in marks if any(at is not None and at < step for at in each["steps"]))
        spec = spec.model_copy(update={"forked_at": step, "interventions": kept})
        return self._run(spec, call, rows, capture, interventions, listener, Replay(record, step))

    def _plan(
        self, prompt: Any, seed: Seed, arguments: Mapping[str, Any]
    ) -> tuple[RunSpec, dict[str, Any], int | None]:
        """Return the spec, the pipeline's keyword arguments and the number of samples."""
        with self._in_lockstep():
            return self._checked(prompt, seed, arguments)

    def _checked(
        self, prompt: Any, seed: Seed, arguments: Mapping[str, Any]
    ) -> tuple[RunSpec, dict[str, Any], int | None]:
        self.dispatch()
        self._take_in_parts()
        given = dict(arguments) if prompt is None else {"prompt": prompt, **arguments}
        checks.check(self._loaded, given)
        prompts, images = checks.count_prompts(given), checks.count_images(given)
        call = dict(given)
        if seed is not None:
            if "generator" in call:
                raise InputError("Give a seed or a generator, not both.")
            by_hand = isinstance(self._loaded, Loop)
            noise = single(seed) if by_hand else generators(seed, prompts=prompts, images=images)
            if not by_hand or checks.takes(self._loaded, "generator"):
                call["generator"] = noise
        elif "generator" not in call:
            for manager in self.managers.values():
                manager.share_noise()
        spec = RunSpec(model=self._reference, arguments=set_apart(given), seed=normal(seed))
        samples = self._loaded.samples if isinstance(self._loaded, Loop) else None
        return spec, call, samples or prompts * images

    def _briefly(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return a run's arguments, with one step unless they say otherwise."""
        counted = checks.takes(self.pipeline, "num_inference_steps")
        return {"num_inference_steps": 1, **arguments} if counted else dict(arguments)

    def _system(self) -> System:
        by_hand = isinstance(self._loaded, Loop)
        return System(
            self.components,
            self._loaded,
            branches=self._loaded.branches if by_hand else None,
            by_hand=by_hand,
        )

    def _take_in_parts(self) -> None:
        """Make modules ready that are new since the last run: somebody may have replaced one."""
        for name, part in self.components.items():
            known = self._parts.get(name)
            if isinstance(part, nn.Module) and (known is None or known() is not part):
                part.eval()
                self._parts[name] = weakref.ref(part)
                self.shapes = {}

    def _finish(self, record: Record) -> None:
        record.model = self
        record.samplers = self._samplers()

    def _samplers(self) -> dict[str, str]:
        """Return the schedulers with their configuration, as text."""
        found = {}
        for name, each in self._system().schedulers.items():
            config = dict(getattr(each, "config", {}))
            own = {key: config[key] for key in sorted(config) if not key.startswith("_")}
            found[name] = f"{type(each).__name__} {own}"
        return found

    def _begin(self, session: Session, trace: Trace) -> None:
        self._occupy(session)
        self._trace = trace

    def _occupy(self, session: Session) -> None:
        # Unlike a lock, a dict says whose the run is: an interrupt at any opcode can be tidied up after.
        taken = any(
            _OCCUPIED.setdefault(each, session) is not session for each in session.system.denoisers.values()
        )
        if taken or self._running.setdefault("run", session) is not session:
            raise BusyError(
                "This model is already running, or another that has its denoiser. Wait for that run to end "
                "or stop it; two runs of one denoiser would mix their values."
            )
        self._together = self._in_lockstep()
        self._together.__enter__()

    def _in_lockstep(self) -> AbstractContextManager[Any]:
        """Return what ends a run of ours where another rank's failed."""
        meshes = [each.device_mesh for each in self.managers.values() if hasattr(each, "device_mesh")]
        if not meshes:
            return nullcontext()
        from workbench.models.parallel.lockstep import Lockstep

        return Lockstep(meshes)

    def _end(self, session: Session) -> None:
        """Leave nothing of a run on the model; called twice, for an interrupt in the first."""
        session.rig.sweep()
        for each in session.system.denoisers.values():
            if _OCCUPIED.get(each) is session:
                _OCCUPIED.pop(each, None)
        if self._running.get("run") is session:
            self._trace = None
            del self._running["run"]
            self._together.__exit__(*sys.exc_info())
