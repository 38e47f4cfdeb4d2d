"""Prompt-to-prompt: another prompt in the layout of a run that is there.

Hertz et al., 2022 (arXiv:2208.01626): the attention of the one run is put into the other, that to the words
for the first steps, that of the image to itself for fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import functional

from workbench.attention.geometry import is_attention
from workbench.attention.maps import AttentionMaps, resize
from workbench.attention.request import Attention
from workbench.attention.words import laid_out
from workbench.errors import InputError
from workbench.experiments.texts import readings
from workbench.interventions.attention import InjectAttention, Reweight
from workbench.interventions.intervention import Intervention
from workbench.models.model import DiffusionModel
from workbench.tracing.capture import Capture
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site, modules

_THRESHOLD = 0.3
"""From which on a word's map counts as the word's place, its least value taken as 0 and its largest as 1.

The paper divides by the largest alone; where a model spreads its attention that is the whole picture."""

_BLEND_FROM = 0.2
"""The share of the steps after which only the words' place changes."""


@dataclass(frozen=True)
class TakeLatents(Intervention):
    """Put another run's latents in place of this run's, after each step: where the mask is.

    Attributes:
        site: what the scheduler puts out.
        source: the run whose latents they are.
    """

    site: str = "scheduler.step:output[0]"
    source: Record = field(kw_only=True, repr=False)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return the source's latents, ``(batch, channels, rows, columns)``."""
        kept = self.source.ticks[row.tick]["latents"]
        assert kept is not None
        return kept.to(value.device, value.dtype)


def prompt_to_prompt(
    source: Record,
    prompt: str,
    *,
    cross: float = 0.8,
    own: float = 0.4,
    reweight: Mapping[str, float] | None = None,
    blend: tuple[str, str] | None = None,
    layers: str = "*",
) -> Record:
    """Run another prompt with the attention of a run.

    Where words were exchanged, each new one takes the attention of the one in its place; words that were
    added keep their own; all others take what they had.

    Args:
        source: the run whose layout is kept.
        prompt: the other prompt.
        cross: for which share of the steps attention to the words is the source's, from 0 to 1.
        own: for which share that of the image to itself is.
        reweight: words of ``prompt`` and by what their attention is multiplied.
        blend: a word of the source's prompt and one of ``prompt``; the image changes only where either is.
        layers: which attention layers, as a pattern of their paths.

    Returns:
        The run of the other prompt, with the source's noise.

    Raises:
        InputError: a share that is none, or a source that cannot be run again.
        UnknownNameError: a word that the prompt has not.

    Example:
        >>> source = model.record("a red circle left of a blue square", seed=0)
        >>> wb.prompt_to_prompt(source, "a green circle left of a blue square").images[0]
    """
    for name, share in (("cross", cross), ("own", own)):
        if not 0 <= share <= 1:
            raise InputError(f"{name}={share!r} is no share of the steps. Give a number from 0 to 1.")
    model = source.model
    if not isinstance(model, DiffusionModel):
        raise InputError("This record does not know its model, so it cannot be run again. Record it anew.")
    if source.spec.interventions or source.ledger[0].samples not in (None, 1):
        raise InputError(
            "Prompt-to-prompt begins with a plain run of one prompt; this one has interventions or several "
            "samples. Record it without: source = model.record(prompt, seed=0)."
        )
    steps = source.ledger.steps
    wanted = range(max(round(cross * steps), round(own * steps)))
    first = _with_attention(source, model, wanted, blend, layers)
    edits = _injections(first, model, prompt, range(round(cross * steps)), range(round(own * steps)), layers)
    if reweight:
        edits.append(Reweight(words=reweight))
    if blend is None:
        return source.fork(0, prompt=prompt, interventions=edits)
    seen = source.fork(0, prompt=prompt, interventions=edits, capture=[_place_of(blend[1])])
    masks = [_mask(each, like=source) for each in (_all_maps(first)[2], _all_maps(seen)[0])]
    late = range(round(_BLEND_FROM * steps), steps)
    outside = TakeLatents(source=source, mask=(~(masks[0] | masks[1])).float(), steps=late)
    return source.fork(0, prompt=prompt, interventions=[*edits, outside])


def align(source: Sequence[int], target: Sequence[int]) -> torch.Tensor:
    """Return how much each of the target's tokens takes from each of the source's, ``(target, source)``.

    Tokens that both have take from each other, in order. A stretch that was exchanged takes from the one in
    its place, a token each or, where they differ in length, a share of all. What was added takes nothing.
    """
    shares = torch.zeros(len(target), len(source))
    for kind, i0, i1, j0, j1 in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        if kind not in ("equal", "replace"):
            continue
        if i1 - i0 == j1 - j0:
            shares[range(j0, j1), range(i0, i1)] = 1
        else:
            shares[j0:j1, i0:i1] = 1 / (i1 - i0)
    return shares


def _with_attention(
    source: Record, model: DiffusionModel, steps: range, blend: tuple[str, str] | None, pattern: str
) -> Record:
    """Return the source's run again, with what is injected from it."""
    known = modules(model.denoisers).items()
    layers = [path for path, module in known if is_attention(module) and fnmatchcase(path, pattern)]
    kept: list[Any] = [Attention(steps=[0], top=1), Attention(steps=[0], top=1, block="image->image")]
    if blend is not None:
        kept.append(_place_of(blend[0]))
    if steps:
        kept += [
            Capture(f"{path}:{port}", steps=steps, branch="cond")
            for path in layers
            for port in ("query", "key")
        ]
    return source.fork(0, capture=kept)


def _injections(
    first: Record, model: DiffusionModel, prompt: str, cross: range, own: range, layers: str
) -> list[Intervention]:
    edits: list[Intervention] = []
    if cross:
        length = sum(len(word.columns) for word in _all_maps(first)[0].text)
        alignment = _correspondence(model, first.spec.arguments, prompt, length)
        edits.append(InjectAttention(layers, cross, source=first, alignment=alignment))
    # Joint attention is in both; it was put in whole, with the words.
    to_words, to_itself = (set(maps.layers) for maps in _all_maps(first)[:2])
    if own and to_itself - to_words:
        edits.append(InjectAttention(layers, own, source=first, block="image->image"))
    return edits


def _correspondence(
    model: DiffusionModel, arguments: Mapping[str, Any], after: str, length: int
) -> torch.Tensor:
    """Return `align` of two prompts along the text as attention sees it, ``(length, length)``."""
    before = arguments["prompt"]
    before = before if isinstance(before, str) else before[0]
    read = [readings(model, prompt, arguments) for prompt in (before, after)]
    laid = laid_out(read[0], length)
    if laid is None:
        raise InputError(
            f"Attention sees {length} tokens of text, which none of this model's tokenizers make, so it is "
            "not known which correspond. Use cross=0, or wb.InjectAttention with an alignment of your own."
        )
    chosen = [next(each for each in read[1] if each.tokenizer == part.tokenizer) for part in laid]
    parts = [align(old.ids, new.ids) for old, new in zip(laid, chosen, strict=True)]
    whole: torch.Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return whole


def _place_of(word: str) -> Attention:
    return Attention(words=[word], reduce=["heads", "steps"])


def _all_maps(record: Record) -> tuple[AttentionMaps, ...]:
    found = record.attention
    return found if isinstance(found, tuple) else (found,)


def _mask(maps: AttentionMaps, *, like: Record) -> torch.Tensor:
    """Return where a word is, boolean ``(rows, columns)`` of the latents, widened by one as in the paper."""
    latents = like.step_latents(-1)
    if latents.ndim != 4:
        raise InputError("blend needs latents that are a picture, (batch, channels, rows, columns).")
    rows, columns = latents.shape[-2:]
    found = maps.map(0, size=(columns, rows))
    widened = functional.max_pool2d(found[None, None], 3, 1, 1)[0, 0]
    spread = (widened - widened.min()) / (widened.max() - widened.min()).clamp(min=1e-12)
    return resize(spread, (rows, columns)) > _THRESHOLD
