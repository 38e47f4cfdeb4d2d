"""What ``scheduler.step`` is called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from workbench.tracing.structure import Leaf
from workbench.tracing.system import as_number, parameters

_USUAL = ("model_output", "timestep", "sample")


@dataclass(frozen=True)
class SchedulerCall:
    """One call of ``scheduler.step``.

    Most schedulers take the prediction, the time and the latents, in this order; some have more between.

    Attributes:
        names: the parameters' names, in order.
        args: the positional arguments.
        kwargs: the others.
    """

    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SchedulerCall:
        """Return a call of a scheduler by the names its class gives the arguments."""
        names = parameters(type(scheduler).step)[1:]
        return cls(names if set(_USUAL) <= set(names) else _USUAL, args, kwargs)

    @property
    def leaf(self) -> Leaf:
        """Where in ``(args, kwargs)`` the prediction is."""
        return (1, "model_output") if "model_output" in self.kwargs else (0, self.names.index("model_output"))

    @property
    def model_output(self) -> torch.Tensor:
        """The guided prediction."""
        output: torch.Tensor = self._named("model_output")
        return output

    @property
    def sample(self) -> torch.Tensor:
        """The latents."""
        sample: torch.Tensor = self._named("sample")
        return sample

    @property
    def timestep(self) -> float:
        """The timestep; of the first row, where each has one."""
        return as_number(self._named("timestep"))

    def handing_over(self, model_output: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's arguments with another prediction."""
        if "model_output" in self.kwargs:
            return self.args, {**self.kwargs, "model_output": model_output}
        place = self.names.index("model_output")
        return (*self.args[:place], model_output, *self.args[place + 1 :]), self.kwargs

    def _named(self, name: str) -> Any:
        return self.kwargs[name] if name in self.kwargs else self.args[self.names.index(name)]
