"""One run of a system, watched and edited."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from workbench.errors import InputError, OutOfOrderError, RunStopped
from workbench.tracing.acted import Acted
from workbench.tracing.branches import check_branch
from workbench.tracing.clock import Clock, Tick
from workbench.tracing.guards import check, check_denoisers, check_graph
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.ports import hook_port
from workbench.tracing.record import Passage, Record, RunSpec
from workbench.tracing.replay import Replay
from workbench.tracing.rig import Rig, Target
from workbench.tracing.sites import Site, bare, resolve_all
from workbench.tracing.structure import keep, keep_tensor, pick, put
from workbench.tracing.system import System


class Edit(Protocol):
    """Something that changes the value at a site."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it acts on."""

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Return the value to go on with; ``value`` itself when this is not its moment."""


@runtime_checkable
class Probe(Protocol):
    """Something that watches a run by other means than module hooks."""

    def watching(self, session: Session) -> AbstractContextManager[None]:
        """Return the context the run happens in."""

    def deliver(self, record: Record) -> None:
        """Put what was seen into the record."""


@runtime_checkable
class Taker(Protocol):
    """A probe that is handed what passes at its sites, after every edit."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it takes from."""

    def take(self, session: Session, site: Site, value: Any) -> None:
        """Take what passes at a site."""


class Listener(Protocol):
    """Told how a run goes on; an exception it raises ends the run."""

    def started(self, row: Row) -> None:
        """A denoiser call begins."""

    def ticked(self, tick: Tick, latents: torch.Tensor) -> None:
        """The scheduler was stepped."""


class Session:
    """Runs a system once and leaves a `Record`.

    Args:
        system: what to run.
        arguments: the call's keyword arguments.
        spec: what was asked, for the record.
        rows: how many samples the run makes, if known.
        edits: applied in order at their sites, before captures.
        capture: the sites to keep.
        probes: other watchers.
        replay: recorded outputs that stand in for the denoiser up to a step.
        listener: told how the run goes on.
    """

    def __init__(
        self,
        system: System,
        arguments: Mapping[str, Any],
        spec: RunSpec,
        *,
        rows: int | None = None,
        edits: Sequence[Edit] = (),
        capture: Iterable[Site] = (),
        probes: Sequence[Probe] = (),
        replay: Replay | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.system = system
        self.arguments = arguments
        # What a probe puts into the run itself comes after all that was asked for.
        self._asked = list(edits)
        self.edits = [*edits, *(own for each in probes for own in getattr(each, "edits", ()))]
        self.capture = list(dict.fromkeys(capture))
        # Some edits reach what no site holds; they watch the run, inside of all that looks at it.
        self.probes = [*probes, *(each for each in self.edits if isinstance(each, Probe))]
        self.takers = [each for each in self.probes if isinstance(each, Taker)]
        self.replay = replay
        self.attached: list[Callable[[Rig], None]] = []
        self.ready: list[Callable[[], None]] = []
        self.recomputing = False
        self.rig = Rig()
        self.clock = Clock(system, rows, arguments.get("prompt"))
        self.acted = Acted(self.clock, replay)
        self.record = Record(spec, ledger=self.clock.ledger)
        if listener is not None:
            self.clock.started.append(listener.started)
            self.clock.ticked.append(listener.ticked)

    def run(self) -> Record:
        """Run to the end."""
        with self.watching() as record, self._noise():
            for listener in self.ready:
                listener()
            record.output = self.system.call(**self.arguments)
        return record

    def let_go(self) -> None:
        """Hold nothing in circles, after the run's end: what it kept then lives as long as its record."""
        self.rig.forget()
        self.attached.clear()
        self.ready.clear()
        for told in (self.clock.started, self.clock.finished, self.clock.ticked):
            told.clear()

    @property
    def own_noise(self) -> bool:
        """Whether the run draws from torch's own generator: it is handed none."""
        return self.arguments.get("generator") is None

    @contextmanager
    def _noise(self) -> Iterator[None]:
        seed = self.record.spec.seed
        if seed is None or not self.own_noise:
            yield
            return
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed if isinstance(seed, int) else seed[0])
            yield

    @contextmanager
    def watching(self) -> Iterator[Record]:
        """Watch and edit what is run inside.

        Whatever happens, everything put on the model is taken off again: the sweep stands in two
        nested ``finally``, so that an interrupt in the first leaves the second.
        """
        try:
            try:
                self._install()
                with ExitStack() as stack:
                    for probe in self.probes:
                        stack.enter_context(probe.watching(self))
                    yield self.record
                self.system.check_unchanged()
            except RunStopped as stopped:
                stopped.record = self.record
                raise
            finally:
                self.rig.sweep()
        finally:
            self.rig.sweep()
        if self.system.by_hand:
            self._check_watched()
        self._check_edited()
        for probe in self.probes:
            probe.deliver(self.record)

    def replaying(self, row: Row | None) -> bool:
        """Whether this call's output is a recorded one."""
        return self.replay is not None and row is not None and self.replay.covers(row)

    @contextmanager
    def again(self, row: Row | None) -> Iterator[None]:
        """Compute a call that has passed once more: edits are made as then, and nothing is kept."""
        now, self.clock.row, self.recomputing = self.clock.row, row, True
        try:
            yield
        finally:
            self.clock.row, self.recomputing = now, False

    def _install(self) -> None:
        self.system.check_unchanged()
        for each in self._asked:
            check_branch(getattr(each, "branch", ALL), self.system.denoisers.values(), self.system.branches)
        self.record.captured = {str(site): [] for site in self.capture}
        wanted = self._wanted()
        places = {place: resolve_all(self.system.components, place.path) for place in wanted}
        check(self.system.components, places)
        check_denoisers(self.system.denoisers, forking=self.replay is not None)
        self.record.rng_state = torch.get_rng_state()
        self.clock.started.append(self._starts)
        self.clock.finished.append(self._finish)
        self.clock.ticked.append(self._tick)
        self.clock.attach(self.rig)
        for attach in self.attached:
            attach(self.rig)
        for place, targets in places.items():
            for target in targets:
                self._hook(place, target, wanted[place])
        if self.replay is not None:
            self.replay.attach(self.rig, self.clock)
            for site in self.capture:
                self.record.captured[str(site)].extend(self.replay.passages(site))

    def _wanted(self) -> dict[Site, _Wanted]:
        """What is wanted of each module port."""
        found: dict[Site, _Wanted] = defaultdict(_Wanted)
        for edit in self.edits:
            for site in edit.sites:
                found[bare(site)].edits.append((site, edit))
        for taker in self.takers:
            for site in taker.sites:
                found[bare(site)].takers.append((site, taker))
        for site in self.capture:
            found[bare(site)].captures.append((site, self.record.captured[str(site)]))
        return dict(found)

    def _hook(self, place: Site, target: Target, wanted: _Wanted) -> None:
        edits, takers, captures = wanted.edits, wanted.takers, wanted.captures

        def pass_by(value: Any) -> Any:
            row = self.clock.now
            if edits:
                self.acted.passing(place, row)
            if self.replay is not None and self.replaying(row):
                return value
            for site, edit in edits:
                value = self._apply(edit, site, value)
            if self.recomputing:
                return value
            for site, kept in captures:
                part = pick(value, site.leaf, site=str(site)) if site.leaf else value
                call, branch = (None, None) if row is None else (row.call, row.only)
                kept.append(Passage(call, keep(part), branch))
            for site, taker in takers:
                taker.take(self, site, value)
            return value

        def kept_alone(value: Any) -> Any:
            """Do what `pass_by` does where nothing else is wanted, as at every module of a large record."""
            if not self.recomputing:
                row = self.clock.now
                call, branch = (None, None) if row is None else (row.call, row.only)
                alone.append(Passage(call, keep(value), branch))
            return value

        plain = [kept for site, kept in captures if not site.leaf]
        if len(plain) == len(captures) == 1 and not edits and not takers and self.replay is None:
            alone = plain[0]
            hook_port(self.rig, target, place.port, kept_alone)
        else:
            hook_port(self.rig, target, place.port, pass_by)

    def _check_watched(self) -> None:
        """Refuse a run whose loop called another denoiser or scheduler than it said."""
        calls, ticks = len(self.record.ledger), len(self.record.ticks)
        if (calls == 0) == (ticks == 0):
            return
        missing = "the denoiser" if calls == 0 else "the scheduler"
        error = OutOfOrderError(
            f"Of the components, the denoisers were called {calls} times and the schedulers stepped {ticks} "
            f"times, so there are no steps. Give {missing} that your loop uses: components={{…}}."
        )
        error.record = self.record
        raise error

    def _check_edited(self) -> None:
        """Refuse a run in which an edit that was asked for did nothing, unless the run was ended early."""
        total = self.clock.total_steps
        if total is not None and self.record.ledger.steps < total:
            return
        timed = [each for each in self._asked if hasattr(each, "steps") and hasattr(each, "branch")]
        others = [each for each in self.edits if not any(each is one for one in timed)]
        try:
            self.acted.check_passed([site for each in others for site in each.sites])
            self.acted.check(timed)
        except OutOfOrderError as error:
            error.record = self.record
            raise

    def _apply(self, edit: Edit, site: Site, value: Any) -> Any:
        old = pick(value, site.leaf, site=str(site))
        new = edit.apply(site, old, self.clock.now, self.clock.total_steps)
        if new is not old:
            self.acted.note(edit, str(site), self.clock.now)
        return value if new is old else put(value, site.leaf, new, site=str(site))

    def _starts(self, _: Row) -> None:
        self.system.check_unchanged()
        if self.system.by_hand and torch.is_grad_enabled():
            check_graph(self.system.denoisers)

    def _finish(self, _: Row, output: Any) -> None:
        self.record.calls.append(keep(output))

    def _tick(self, tick: Tick, latents: torch.Tensor) -> None:
        self.system.check_unchanged()
        self.acted.check_finite(tick, latents)
        if self.record.initial is None:
            self.record.initial = keep_tensor(tick.before)
            if self.system.by_hand and tick.before.shape[0] != self.clock.rows:
                raise InputError(
                    f"The loop makes {tick.before.shape[0]} samples at once, and {self.clock.rows} were "
                    f"expected, one for each prompt. Say so: samples={tick.before.shape[0]}."
                )
        self.record.ticks.append(
            {
                "latents": keep_tensor(latents),
                "noise_pred": keep_tensor(tick.noise_pred),
                "pred_x0": None if tick.pred_x0 is None else keep_tensor(tick.pred_x0),
            }
        )


@dataclass
class _Wanted:
    """What is wanted of a module's port, each with the site as it was asked for."""

    edits: list[tuple[Site, Edit]] = field(default_factory=list)
    takers: list[tuple[Site, Taker]] = field(default_factory=list)
    captures: list[tuple[Site, list[Passage]]] = field(default_factory=list)
