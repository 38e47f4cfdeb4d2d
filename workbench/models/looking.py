"""What can be known of a run's attention and words before it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from workbench.attention.capture import Run
from workbench.attention.concepts import ConceptAttention, ConceptReader, join
from workbench.attention.plan import Plan
from workbench.attention.request import Attention
from workbench.attention.words import Tokens, tokenize
from workbench.errors import InputError, RunStopped
from workbench.tracing.seeds import Seed
from workbench.tracing.session import Session
from workbench.tracing.steps import Steps

if TYPE_CHECKING:
    import torch

    from workbench.tracing.clock import Tick
    from workbench.tracing.ledger import Row
    from workbench.tracing.record import Record


class Looking:
    """Methods of a model that look ahead."""

    def plan(
        self: Any, attention: Attention, prompt: Any = None, *, seed: Seed = None, **arguments: Any
    ) -> Plan:
        """Return what attention would take in a run: bytes and seconds, by layer and in all.

        The run is begun and stopped after its first step of the scheduler; nothing of it is kept.

        Args:
            attention: what would be asked of the run.
            prompt: the run's, as all else.
            seed: noise seed.
            **arguments: the pipeline's own.

        Example:
            >>> print(model.plan(wb.Attention(block="image->image"), "a red circle", num_inference_steps=20))
        """
        if not isinstance(attention, Attention):
            raise InputError(f"plan takes wb.Attention(…) first; {attention!r} is none.")
        planned = _Planned(attention)
        with suppress(RunStopped):
            self.record(prompt, seed=seed, capture=[planned], listener=_OneTick(), **arguments)
        if planned.run is None or planned.run.plan is None:
            raise InputError(
                f"No layer has attention {attention.block!r} in branch {attention.branch!r} of this model's "
                "first step, so there is nothing to plan."
            )
        return planned.run.plan

    def concepts(
        self: Any,
        names: Sequence[str],
        *,
        steps: Steps = None,
        branch: str = "cond",
        sample: int = 0,
        **arguments: Any,
    ) -> ConceptAttention:
        """Return what to capture for maps of concepts by ConceptAttention (Helbling et al., 2025).

        Each concept is the prompt of a run that is stopped after its first step of the scheduler, and read
        there where it is handed to attention. In joint attention it then goes through the blocks beside the
        prompt, as in the paper; in cross-attention, which the paper has not, it stands for what the layer
        would put out if it saw the concept alone.

        Args:
            names: words or phrases; they compete, so name the ground too.
            steps: which steps; None is every step.
            branch: which guidance branch.
            sample: of which of the run's samples.
            **arguments: of the runs that read them, such as ``height`` and ``width``.

        Example:
            >>> concepts = model.concepts(["circle", "square", "ground"])
            >>> record = model.record("a red circle", seed=0, capture=[concepts])
            >>> record.attention.map("circle", size=(64, 64))
        """
        if isinstance(names, str) or not names:
            raise InputError(f"concepts takes a list of words: [{names!r}].")
        readers = [ConceptReader(name) for name in names]
        for reader in readers:
            with suppress(RunStopped):
                self.record(reader.name, seed=0, capture=[reader], listener=_OneTick(), **arguments)
        return join(readers, steps=steps, branch=branch, sample=sample)

    def words(self: Any, prompt: str, *, max_sequence_length: int | None = None) -> dict[str, Tokens]:
        """Return how each of the model's tokenizers reads a prompt, by its name.

        Templates that a pipeline puts around the prompt are not in it.

        Args:
            prompt: one prompt.
            max_sequence_length: how many tokens the longest-reading encoder is given, if that is asked of
                the pipeline.

        Raises:
            InputError: the model has no tokenizer.
        """
        if not isinstance(prompt, str):
            raise InputError(f"words reads one prompt; {prompt!r} is none.")
        readers = {
            name: part for name, part in self.components.items() if hasattr(part, "convert_ids_to_tokens")
        }
        if not readers:
            raise InputError("This model has no tokenizer, so it reads no words.")
        longest = max(reversed(readers), key=lambda name: readers[name].model_max_length)
        return {
            name: tokenize(reader, prompt, max_sequence_length if name == longest else None)
            for name, reader in readers.items()
        }


class _Planned:
    """Plans a request in place of keeping what it asks for."""

    def __init__(self, asked: Attention) -> None:
        self.asked = asked
        self.run: Run | None = None

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the attention layers of a run."""
        self.run = Run(self.asked, session, planning=True)
        with self.run.watching():
            yield

    def deliver(self, record: Record) -> None:
        """Nothing: the plan is all."""


class _OneTick:
    """Ends a run when the scheduler has been stepped once."""

    def started(self, row: Row) -> None:
        """A denoiser call begins."""

    def ticked(self, tick: Tick, latents: torch.Tensor) -> None:  # noqa: ARG002
        """The scheduler was stepped."""
        raise RunStopped("planned")
