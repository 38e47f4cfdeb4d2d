"""A denoising loop that somebody wrote by hand, traced like a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from PIL import Image

from workbench.errors import InputError, TraceError
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.system import System

if TYPE_CHECKING:
    from workbench.models.model import DiffusionModel


_OURS = ("seed", "capture", "interventions", "listener", "graph")
"""What `DiffusionModel.record` and `generate` take themselves."""


class Loop:
    """A function that denoises, and the models and the scheduler that it uses.

    Args:
        function: the loop. What it takes becomes the run's arguments: ``prompt``, ``generator`` and
            ``num_inference_steps`` mean here what they mean in a pipeline. What it returns is the output.
        components: every module and scheduler it calls, by name.
        samples: how many samples it makes at once; None is one for each prompt.
        branches: its guidance branches in their order; None tells them by the words.

    Raises:
        InputError: no function, one whose arguments are called as ours are, no denoiser or no scheduler.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        components: Mapping[str, Any],
        *,
        samples: int | None = None,
        branches: Sequence[str] | None = None,
    ) -> None:
        if not callable(function):
            raise InputError(f"trace_loop takes the function with your loop; {function!r} is none.")
        taken = [name for name in inspect.signature(function).parameters if name in _OURS]
        if taken:
            raise InputError(
                f"The loop takes {', '.join(taken)}, which record() takes itself and would not hand on. Call "
                "it otherwise; for noise, take a generator."
            )
        self.components = check_components(components)
        self.samples = samples
        self.branches = None if branches is None else tuple(branches)
        self._function = function
        # Looked at, as those of a pipeline are: which arguments there are, and what to call it.
        self.__signature__ = inspect.signature(function)
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop."""
        return as_output(self._function(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        components = vars(self).get("components", {})
        if name not in components:
            raise AttributeError(name)
        return components[name]


def as_output(result: Any) -> Any:
    """Return what a loop made as a pipeline would: pictures under ``images``, anything else as it is."""
    pictures = [result] if isinstance(result, Image.Image) else result
    if isinstance(pictures, (list, tuple)) and pictures and isinstance(pictures[0], Image.Image):
        return {"images": list(pictures)}
    return result


def check_components(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a loop by name.

    Raises:
        InputError: there is no module that takes a timestep, or no scheduler.
    """
    parts = dict(components)
    system = System(parts, lambda: None)
    named = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items()) or "nothing"
    if not system.denoisers:
        raise InputError(
            "A loop needs its denoiser among the components: a module whose forward takes a timestep. There "
            f"is {named}. Give components={{'unet': unet, 'scheduler': scheduler, …}}."
        )
    if not system.schedulers:
        raise InputError(
            "A loop needs its scheduler among the components: steps are what it is stepped by. There is "
            f"{named}. Give components={{'unet': unet, 'scheduler': scheduler, …}}."
        )
    return parts


class Block:
    """A ``with`` block that is itself the run: the loop stands in it, and what is wanted was said before.

    After the block it has all that a record has.
    """

    def __init__(
        self,
        session: Session,
        *,
        begin: Callable[[Session], None],
        end: Callable[[Session], None],
        finish: Callable[[Record], None],
    ) -> None:
        self._session = session
        self._watching = session.watching()
        self._begin = begin
        self._end = end
        self._finish = finish
        self._begun = False

    @property
    def record(self) -> Record:
        """What the run has left behind until now."""
        return self._session.record

    @property
    def output(self) -> Any:
        """What the loop made, as told; ``run.output = image`` lets the record show it."""
        return self.record.output

    @output.setter
    def output(self, made: Any) -> None:
        self.record.output = as_output(made)

    def __enter__(self) -> Self:
        if self._begun:
            raise TraceError("A run happens once. Call model.trace_loop(…) again for another.")
        self._begun = True
        try:
            self._begin(self._session)
            self._watching.__enter__()
            return self
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                self._watching.__exit__(kind, error, trace)
            finally:
                self._leave()
        finally:
            self._leave()
        self._session.let_go()
        if kind is None:
            self._finish(self.record)

    def _leave(self) -> None:
        """Leave nothing of this run behind; called twice, for an interrupt in the first."""
        self._watching.gen.close()
        self._end(self._session)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._session.record, name)


def unreached(**_: Any) -> Any:
    """Stand for the call of a system whose code is a `Block`.

    Raises:
        InputError: always.
    """
    raise InputError("The run is the block itself; nothing is called.")


def trace_loop(
    function: Callable[..., Any],
    *,
    components: Mapping[str, Any],
    samples: int | None = None,
    branches: Sequence[str] | None = None,
) -> DiffusionModel:
    """Open a denoising loop of one's own as a model: ledger, sites, patches, records and forks are the same.

    Args:
        function: the loop; its parameters are the arguments of `DiffusionModel.record`. Where it takes a
            ``generator``, it is handed one of ``seed=``; where not, torch's own is seeded for the run.
        components: every module and scheduler that it calls, by name: ``{"unet": unet, "scheduler": …}``.
        samples: how many samples it makes at once; None is one for each prompt.
        branches: its guidance branches, in the order of the rows of a call or of its calls:
            ``("uncond", "cond")``. None tells them by the words, for which the tokenizer and the text encoder
            must be among the components and be called in the loop; the others are ``guide0``, ``guide1``.

    Raises:
        InputError: no function, one whose arguments are called as ours are, no denoiser or no scheduler.

    Example:
        >>> def loop(steps=50):
        ...     scheduler.set_timesteps(steps)
        ...     sample = torch.randn(1, 3, 32, 32)
        ...     for t in scheduler.timesteps:
        ...         sample = scheduler.step(unet(sample, t).sample, t, sample).prev_sample
        ...     return sample
        >>> model = trace_loop(loop, components={"unet": unet, "scheduler": scheduler})
        >>> model.record(seed=0, capture=["unet.mid_block"]).latents
    """
    from workbench.models.model import DiffusionModel

    return DiffusionModel(Loop(function, components, samples=samples, branches=branches))
