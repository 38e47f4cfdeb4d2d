"""The values of a run that no module puts out: what the scheduler is handed, predicts and leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workbench.errors import InputError
from workbench.tracing.reads import plain
from workbench.tracing.sites import TICK, Site
from workbench.tracing.structure import check_fit


class RunValues:
    """Gives a `Trace` what passes its schedulers, to read and to replace."""

    @property
    def latents(self: Any) -> Any:
        """In the block: the latents the next tick leaves, ``(batch, channels, ...)``; after it: of all ticks.

        That is what the step leaves, but where a step has two ticks (Heun, KDPM2): there go by `ticks`.
        """
        return self._run_value("latents")

    @latents.setter
    def latents(self: Any, new: Any) -> None:
        self.replace(Site.parse("latents"), new)

    @property
    def noise_pred(self: Any) -> Any:
        """In the block: the guided prediction handed over in the next tick; after it: of all ticks.

        Where a step has two ticks, go by `ticks` for both.
        """
        return self._run_value("noise_pred")

    @noise_pred.setter
    def noise_pred(self: Any, new: Any) -> None:
        self.replace(Site.parse("noise_pred"), new)

    @property
    def pred_x0(self: Any) -> Any:
        """In the block: the clean sample predicted in the next tick, float32; after it: of all ticks.

        Where a step has two ticks, go by `ticks` for both.
        """
        return self._run_value("pred_x0")

    @pred_x0.setter
    def pred_x0(self: Any, new: Any) -> None:
        inputs = Site(TICK, "inputs")
        args, kwargs = plain(self.value(inputs))
        old, wanted, prediction = self._session.clock.predict(args, kwargs), plain(new), None
        if old is not None:
            check_fit(old, wanted, site="pred_x0")
            leaf, prediction = self._session.clock.handing(args, kwargs, wanted)
        if prediction is None:
            raise InputError(
                f"In {self._spot()} no prediction gives another pred_x0: the scheduler's convention is not "
                "known, or there is no noise left. Replace run.noise_pred or run.latents."
            )
        self.replace(replace(inputs, leaf=leaf), prediction)

    def _run_value(self: Any, name: str) -> Any:
        if self.ended:
            return getattr(self.record, name)
        try:
            if name != "pred_x0":
                return self.value(Site.parse(name))
            args, kwargs = plain(self.value(Site(TICK, "inputs")))
            return self._session.clock.predict(args, kwargs)
        except AttributeError as error:
            # Python drops one that a property raises and asks `__getattr__`, which raises it.
            self._failed = error
            raise
