"""Edits of attention weights, made through the fused kernels themselves.

What a head puts out is its weights times its values, and that is linear in both: a word's weights are doubled
by doubling its values, and weights of another run come out of that run's queries and keys. So the kernel
computes the edited attention, and no matrix of weights is ever made but for what is edited.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from workbench.attention.geometry import Scope, grid
from workbench.attention.maps import resize
from workbench.attention.softmax import masked
from workbench.attention.tap import EDIT, Handed, Rest
from workbench.attention.watch import Watch
from workbench.attention.words import find
from workbench.errors import GuardError, InputError, NotFiniteError, OutOfOrderError, ShapeError
from workbench.interventions.intervention import Intervention, check_heads, check_mask, spread
from workbench.interventions.patch import nth_call
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import branch_rows, covers
from workbench.tracing.structure import describe


@dataclass(frozen=True)
class AttentionEdit(Intervention):
    """A change of attention weights.

    Attributes:
        site: attention layers by path; ``*`` stands for anything, and alone for every layer that fits.
        branch: which guidance branch; words are those of its text, of ``uncond`` the negative prompt's.
    """

    site: str = "*"
    branch: str = "cond"

    @property
    def sites(self) -> tuple[Site, ...]:
        """None: an edit acts inside of layers, where no site is."""
        return ()

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Edit the attention layers of a run."""
        acting = _Acting(self, session)
        yield
        acting.check()

    def deliver(self, record: Record) -> None:
        """Nothing: it changed the run."""

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return ``value``: no site is edited."""
        return value

    def fits(self, scope: Scope) -> bool:
        """Whether a layer has what is edited: text to look at, unless an edit says otherwise."""
        return scope.text > 0

    @abstractmethod
    def attend(self, call: Call) -> torch.Tensor:
        """Return what the layer puts out in place of ``call.plain()``."""

    def _check_site(self) -> None:
        if not isinstance(self.site, str) or not self.site:
            raise InputError(f"site={self.site!r} is no path of attention layers, such as '*.attn2'.")
        if self.tokens is not None:
            raise InputError(f"tokens={self.tokens!r}: an edit of attention names words, not places.")


@dataclass
class Call:
    """One attention call that an edit acts on.

    Attributes:
        scope: the layer, and where its text stands.
        handed: what goes to the kernel: ``query``, ``key``, ``value``, ``(batch, heads, tokens, head_dim)``.
        row: the denoiser's call.
        parts: the branches that are edited, with their rows.
        watch: the run's words and the picture's shape.
        rest: the edits that come after, those who look, and the kernel.
        branch: the branch that the edit names, whose text its words are of; of several it is the prompt.
    """

    scope: Scope
    handed: Handed
    row: Row
    parts: Sequence[tuple[str, slice]]
    watch: Watch
    rest: Rest
    branch: str

    def kernel(self, **changed: torch.Tensor) -> torch.Tensor:
        """Return what the rest makes with some of the arguments changed; whoever looks sees these."""
        return self.rest(**{**self.handed, **changed})

    def unseen(self, **changed: torch.Tensor) -> torch.Tensor:
        """Return the same, not seen by those who look: it is only a part of the result."""
        return self.rest.unseen(**{**self.handed, **changed})

    def image_only(self, edited: torch.Tensor) -> torch.Tensor:
        """Return ``edited`` for the image's queries, and in joint attention the text's as they were."""
        if not self.scope.mixed:
            return edited
        made = self.unseen().clone()
        image = self.scope.span("image", edited.shape[2])
        made[:, :, image] = edited[:, :, image]
        return made

    def columns(self, word: str | int | tuple[int, int], sample: int) -> torch.Tensor:
        """Return the keys of a word in a sample's text, ``(count,)``."""
        text = self.scope.span("text", self.handed["key"].shape[2])
        found = find(self.watch.words(text.stop - text.start, sample, self.branch), word)
        return torch.tensor([text.start + column for column in found.columns])

    def heads(self, chosen: Any, count: int) -> list[int]:
        """Return the heads that an edit is of, of ``count``."""
        return check_heads(range(count) if chosen is None else chosen, count, site=self.scope.path)

    def samples(self, edit: Intervention) -> Iterator[tuple[int, int]]:
        """Give the rows of the batch that an edit is of, each with its sample."""
        for _, rows in self.parts:
            yield from self.samples_of(edit, rows)

    def samples_of(self, edit: Intervention, rows: slice) -> list[tuple[int, int]]:
        """Return those of one branch's rows."""
        width = rows.stop - rows.start
        chosen = range(width) if edit.samples is None else self.row.rows_of(edit.samples, width)  # type: ignore[arg-type]
        return [(rows.start + each, each * (self.row.samples or width) // width) for each in chosen]


@dataclass(frozen=True)
class Reweight(AttentionEdit):
    """Give words more or less of the attention that the image pays them.

    The weights of a word's keys are multiplied; the others stay, so that they no longer sum to 1 (Hertz et
    al., 2022, arXiv:2208.01626).

    Attributes:
        words: by what, by word or phrase.
    """

    words: Mapping[str, float] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check that there are words with numbers."""
        super().__post_init__()
        if not isinstance(self.words, Mapping) or not self.words:
            raise InputError(f"words={self.words!r} says nothing. Give words={{'red': 2.0}}.")

    def attend(self, call: Call) -> torch.Tensor:
        """Return the layer's output with the words' values multiplied."""
        value = call.handed["value"].clone()
        heads = call.heads(self.heads, value.shape[1])
        for word, factor in self.words.items():
            for row, sample in call.samples(self):
                columns = call.columns(word, sample)
                for head in heads:
                    value[row, head, columns] *= factor
        return call.image_only(call.kernel(value=value))


@dataclass(frozen=True)
class InjectAttention(AttentionEdit):
    """Put another run's attention weights in place of this run's; the values stay this run's own.

    The weights come out of the other run's queries and keys, which it must have captured
    (``capture=[f"{layer}:query", f"{layer}:key"]``). In joint attention it is the whole matrix.

    Attributes:
        source: the run they come from.
        block: ``"image->text"`` for cross-attention and joint attention, ``"image->image"`` for
            self-attention.
        alignment: how much each token of this run's text takes from each of the source's,
            ``(tokens, source tokens)``; a row of zeros keeps this run's own weights. None is one to one.
    """

    source: Record = field(kw_only=True, repr=False)
    block: str = field(default="image->text", kw_only=True)
    alignment: torch.Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the source and the block."""
        super().__post_init__()
        if not isinstance(self.source, Record):
            raise InputError(f"source={type(self.source).__name__} is no record.")
        if self.block not in ("image->text", "image->image"):
            raise InputError(f"block={self.block!r} is not injected. Give 'image->text' or 'image->image'.")
        if self.alignment is not None and self.block == "image->image":
            raise InputError("alignment says how texts correspond, and no text is in 'image->image'.")

    def fits(self, scope: Scope) -> bool:
        """Whether a layer has the block; joint attention, which is one matrix, goes with the text."""
        return scope.text > 0 if self.block == "image->text" else scope.text == 0

    def attend(self, call: Call) -> torch.Tensor:
        """Return the layer's output under the source's weights."""
        if call.scope.masked:
            raise GuardError(
                f"{call.scope.path} masks part of its keys, and the source's mask is not known, so its "
                "weights cannot be made again. Leave this layer out."
            )
        query, key = call.handed["query"].clone(), call.handed["key"].clone()
        value, own = call.handed["value"], torch.zeros_like(call.handed["value"])
        if self.alignment is not None:
            value = value.clone()
        heads = call.heads(self.heads, query.shape[1])
        for branch, rows in call.parts:
            chosen = [row for row, _ in call.samples_of(self, rows)]
            for port, tensor in (("query", query), ("key", key)):
                given = self._given(call, port, branch, tensor[rows])[[row - rows.start for row in chosen]]
                for head in heads if tensor.shape[1] == query.shape[1] else range(tensor.shape[1]):
                    tensor[chosen, head] = given[:, head]
            if self.alignment is not None:
                self._rearrange(call, value, own, chosen, heads)
        made = call.kernel(query=query, key=key, value=value)
        return made + call.unseen(value=own) if own.any() else made

    def _given(self, call: Call, port: str, branch: str, like: torch.Tensor) -> torch.Tensor:
        """Return the source's for one branch's rows: of its only sample, or of as many as this run has."""
        nth = nth_call(self.source, call.row, branch)
        found = self.source.at(f"{call.scope.path}:{port}", step=call.row.step, branch=branch, nth=nth)
        if found.shape[1:] != like.shape[1:] or len(found) not in (1, len(like)):
            raise ShapeError(
                f"At {call.scope.path}:{port} the source has {describe(found)}, and this run "
                f"{describe(like)}. Run both at the same size, with one sample or as many in the source."
            )
        return found.expand(like.shape).to(like.device, like.dtype)

    def _rearrange(
        self, call: Call, value: torch.Tensor, own: torch.Tensor, chosen: list[int], heads: list[int]
    ) -> None:
        """Put each token's values where the source's weights for it are; what is new keeps its own."""
        assert self.alignment is not None
        text = call.scope.span("text", value.shape[2])
        shares = self.alignment.to(value.device, value.dtype)
        if shares.shape != (text.stop - text.start,) * 2:
            raise ShapeError(
                f"alignment is {tuple(shares.shape)}; {call.scope.path} sees {text.stop - text.start} tokens."
            )
        new = (shares.sum(1) == 0).to(value.dtype)[:, None]
        for row in chosen:
            for head in heads:
                words = value[row, head, text].clone()
                value[row, head, text] = shares.T @ words
                own[row, head, text] = new * words


@dataclass(frozen=True)
class ForceMap(AttentionEdit):
    """Say where the image attends to a word.

    Each place gives the word the weight that is said, and what is left to the other keys, in the proportions
    that they had.

    Attributes:
        word: the word or phrase; several tokens share its weight.
        map: weights in [0, 1], ``(rows, columns)``, of the whole picture, at any size.
    """

    word: str | int | tuple[int, int] = field(kw_only=True)
    map: torch.Tensor = field(kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the map."""
        super().__post_init__()
        check_mask(self.map, "map")

    def attend(self, call: Call) -> torch.Tensor:
        """Return the layer's output with the word's weights as they were said."""
        query, value = call.handed["query"], call.handed["value"]
        edited = call.kernel().clone()
        image = call.scope.span("image", query.shape[2])
        shape = grid(image.stop - image.start, *call.watch.aspect)
        if shape is None:
            raise InputError(f"The queries of {call.scope.path} form no picture.")
        wanted = resize(self.map.float(), shape).flatten().to(query.device)[:, None]
        columns = {row: call.columns(self.word, sample) for row, sample in call.samples(self)}
        # What the others are left with, the word being hidden, is the kernel's own work.
        others = call.unseen(attn_mask=self._hidden(call, columns))
        for row, places in columns.items():
            for head in call.heads(self.heads, query.shape[1]):
                words = value[row, head * value.shape[1] // query.shape[1], places].mean(0)
                left = others[row, head, image] * (1 - wanted)
                edited[row, head, image] = (left + wanted * words).to(edited.dtype)
        return edited

    def _hidden(self, call: Call, columns: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return a mask that hides the word in its rows, together with the layer's own."""
        query, key = call.handed["query"], call.handed["key"]
        mask = torch.zeros(query.shape[0], 1, 1, key.shape[2], device=query.device, dtype=query.dtype)
        for row, places in columns.items():
            mask[row, ..., places] = float("-inf")
        own = call.handed.get("attn_mask")
        return mask if own is None else masked(mask, own).to(mask.dtype)


class _Acting:
    """An edit at work in one run."""

    def __init__(self, edit: AttentionEdit, session: Session) -> None:
        self.edit = edit
        self.session = session
        self.acted = False
        self.watch = Watch(session, None, turn=EDIT, wants=self._wants, look=self._look)
        self.matching = [path for path in self.watch.paths if fnmatchcase(path, edit.site)]
        if not self.matching:
            raise InputError(
                f"No attention layer is called {edit.site!r}. There are {', '.join(self.watch.paths[:4])}…"
            )

    def _wants(self, scope: Scope) -> bool:
        return scope.path in self.matching and (scope.streams is not None or self.edit.fits(scope))

    def _look(self, scope: Scope, handed: Handed, rest: Rest) -> torch.Tensor | None:
        """Edit an attention call, if it is its moment."""
        row, edit = self.session.clock.row, self.edit
        if not edit.fits(scope):
            return None
        if row is None or self.session.replaying(row):
            self.acted = self.acted or row is not None
            return None
        if not covers(edit.steps, row, self.session.clock.total_steps):  # type: ignore[arg-type]
            return None
        parts = branch_rows(row, edit.branch, handed["query"].shape[0])
        if not parts:
            return None
        self.acted = True
        self.session.acted.note(edit, scope.path, row)
        call = Call(scope, handed, row, parts, self.watch, rest, edit.branch)
        made = self._in_part(call, edit.attend(call))
        if not torch.isfinite(made).all() and torch.isfinite(call.unseen()).all():
            raise NotFiniteError(
                f"{type(edit).__name__} at {scope.path} makes values that are not finite, in step "
                f"{row.step}, branch {edit.branch!r}. Look at its strength or weights."
            )
        return made

    def _in_part(self, call: Call, edited: torch.Tensor) -> torch.Tensor:
        """Return as much of an edit as is asked for, and where."""
        edit = self.edit
        if edit.strength == 1 and edit.mask is None:
            return edited
        plain = call.unseen()
        changed = plain + edit.strength * (edited - plain)
        if edit.mask is None:
            return changed
        image = call.scope.span("image", edited.shape[2])
        share = spread(edit.mask, edited[:, :, image], call.row, site=f"{call.scope.path}:heads")
        plain[:, :, image] += share * (changed - plain)[:, :, image]
        return plain

    def check(self) -> None:
        """Refuse a run in which there was nothing to edit."""
        if not self.acted and not self.session.acted.before(self.edit):
            raise OutOfOrderError(
                f"{self.edit!r} changed nothing: none of the layers it names has that attention in its steps "
                f"and in branch {self.edit.branch!r}."
            )
