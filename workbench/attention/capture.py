"""Captures attention while the pipeline's own fused kernels compute it.

From the very queries and keys that the kernel gets (after rotary embeddings and normalisation) the softmax
weights that were asked for are computed beside it. The kernel's own result goes on untouched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from workbench.attention.batching import Batch, Batches, Wanted
from workbench.attention.geometry import IMAGE_TO_TEXT, Scope, grid
from workbench.attention.maps import AttentionMaps
from workbench.attention.plan import LayerCost, Plan, default_budget
from workbench.attention.reduction import Calls, Reduction
from workbench.attention.request import Attention
from workbench.attention.softmax import Places, causal
from workbench.attention.tap import LOOK, Handed, Rest
from workbench.attention.watch import Watch
from workbench.attention.words import Word, find
from workbench.errors import GuardError, InputError
from workbench.tracing.ledger import Row
from workbench.tracing.session import Session
from workbench.tracing.steps import Steps, covers, normal


class Run:
    """One run's attention capture.

    Args:
        asked: what is wanted.
        session: the run.
        planning: whether only the plan is wanted: nothing is kept, and too much is no error.
    """

    def __init__(self, asked: Attention, session: Session, *, planning: bool = False) -> None:
        self.asked = asked
        self.session = session
        self.planning = planning
        self.plan: Plan | None = None
        self._first: Row | None = None
        self._met: Row | None = None
        self._met_wanted = False
        self._fits = True
        self._steps: Steps = normal(asked.steps)
        self._reduction = Reduction(
            {axis: how for axis, how in asked.reductions.items() if axis != "heads"}, asked.dtype
        )
        self._rows: dict[int, Row] = {}
        self._layer_rows: dict[str, list[Row]] = {}
        self._places: dict[str, tuple[int, ...]] = {}
        self._indices: dict[str, Calls] = {}
        self._keys: dict[str, int] = {}
        self._without: set[str] = set()
        self._text: list[Word] | None = None
        self._words: list[Word] = []
        self._columns: torch.Tensor | None = None
        self._expected: set[str] = set()
        self._seen: set[str] = set()
        self._planned: set[str] = set()
        self._batches = Batches()
        self._row: Row | None = None
        self._size = 0
        self._one = slice(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the attention layers of the run."""
        self._watch = Watch(self.session, self.asked.sites, turn=LOOK, wants=self._wants, look=self._look)
        self.session.clock.finished.append(lambda _row, _output: self._finish_call())
        yield

    def maps(self) -> AttentionMaps:
        """Return what was kept.

        Raises:
            InputError, GuardError: a layer that was asked for cannot have given any.
            UnknownNameError: the run has not the branch.
        """
        if self.session.record.ledger:
            self.session.record.ledger.check_branch(self.asked.branch)
        for path in self.asked.sites or ():
            if path in self._without and path not in self._layer_rows:
                raise InputError(
                    f"{path} does not attend to text, so there is no map of words."
                    if self.asked.block == IMAGE_TO_TEXT
                    else f"{path} has no attention {self.asked.block}."
                )
        if self.asked.block != IMAGE_TO_TEXT and self._without.issuperset(self._watch.paths):
            raise InputError(
                f"No layer of this model has attention {self.asked.block}. Ask for another block."
            )
        for path in self._expected - self._seen:
            raise GuardError(
                f"{path} {'attends to text' if self.asked.block == IMAGE_TO_TEXT else 'attends'}, but never "
                "through scaled_dot_product_attention, where maps are taken from. Give it a processor that "
                "calls it, such as AttnProcessor2_0."
            )
        self._keep_all(self._batches.rest())
        self._reduction.aspect = self._watch.aspect
        layers = self._reduction.result()
        return AttentionMaps(
            layers,
            list(self._rows.values()),
            self._words,
            self._layer_rows,
            text=self._text or [],
            block=self.asked.block,
            reduced=self.asked.reductions,
            heads=self._heads(),
            places=self._places,
            top=self.asked.top,
            indices={path: calls.values for path, calls in self._indices.items()},
            keys=self._keys,
        )

    def let_go(self) -> None:
        """Hold nothing in circles, after the run's end."""
        del self._watch

    def _heads(self) -> tuple[int, ...] | None:
        if self.asked.over_heads is not None:
            return None
        return self.asked.heads  # type: ignore[return-value]

    def _wanted_row(self) -> Row | None:
        """Return the ledger row of this call if it is wanted."""
        row = self.session.clock.row
        if row is None or self.session.recomputing:
            return None
        if row is not self._met:
            self._met, self._met_wanted = row, self._wants_row(row)
        return row if self._met_wanted else None

    def _wants_row(self, row: Row) -> bool:
        if self.session.replaying(row) or not row.has(self.asked.branch):
            return False
        return self.planning or covers(self._steps, row, self.session.clock.total_steps)  # type: ignore[arg-type]

    def _wants(self, scope: Scope) -> bool:
        if not scope.may_have(self.asked.block):
            self._without.add(scope.path)
            return False
        if self._wanted_row() is None:
            return False
        self._expected.add(scope.path)
        return True

    def _look(self, scope: Scope, handed: Handed, _: Rest) -> None:
        """Take what is wanted of one attention call."""
        self._seen.add(scope.path)
        row = self._wanted_row()
        if row is None or not scope.has(self.asked.block):
            self._without.add(scope.path)
            return
        query, key = handed["query"], handed["key"]
        if query.shape[0] % len(row.branches):
            raise GuardError(
                f"{scope.path} computes attention for {query.shape[0]} rows of {len(row.branches)} branches, "
                "as for perturbed guidance. Leave it out of Attention(sites=…), or switch that off."
            )
        queries, columns = self._choice(scope, query.shape[2], key.shape[2])
        plan = self._plan(row)
        new = scope.path not in self._planned
        if new:
            self._planned.add(scope.path)
            plan.layers.append(self._cost(scope.path, query, key, queries, columns))
            self._check_heads(plan.layers)
            self._fits = plan.fits
        if not self._fits:
            if row is not self._first and not self.planning:
                plan.check()
            return
        if not self.planning:
            self._note(scope.path, row)
        if new:
            self._keep_all(self._batches.rest())
        began = time.perf_counter()
        query, key, mask = self._sample(row, handed)
        wanted = Wanted(queries, columns, handed.get("scale"), mask)
        self._keep_all(self._batches.add(scope.path, row, query, key, wanted))
        if new:
            self._keep_all(self._batches.rest())
            plan.layers[-1] = replace(plan.layers[-1], seconds=time.perf_counter() - began)

    def _cost(
        self, path: str, query: torch.Tensor, key: torch.Tensor, queries: Places, columns: Places
    ) -> LayerCost:
        """Return what a layer comes to."""
        counts = [_count(each, total) for each, total in ((queries, query.shape[2]), (columns, key.shape[2]))]
        tokens, places = counts[::-1] if self.asked.block == IMAGE_TO_TEXT else counts
        _, heads, asking, width = query.shape
        return LayerCost(path, heads, asking, key.shape[2], width, tokens, places)

    def _check_heads(self, layers: list[LayerCost]) -> None:
        """Refuse heads that the last of some layers has not, and to join those of unlike layers."""
        first, last = layers[0], layers[-1]
        for head in self.asked.heads or ():
            if not -last.heads <= head < last.heads:
                raise InputError(
                    f"{last.path} has {last.heads} heads (0 to {last.heads - 1}); {head} is none of them. "
                    "Choose layers that have it by sites=…."
                )
        apart = "layers" in self.asked.reductions and not self.asked.over_heads and self.asked.heads is None
        if apart and first.heads != last.heads:
            raise InputError(
                f"{first.path} has {first.heads} heads and {last.path} {last.heads}, so they cannot be "
                "reduced together. Reduce 'heads' as well, or choose some by heads=…, or layers by sites=…."
            )

    def _plan(self, row: Row) -> Plan:
        if self.plan is None:
            self._first = row
            budget = default_budget() if self.asked.budget is None else self.asked.budget
            self.plan = Plan(self.asked, self._calls_from(row), budget)
        return self.plan

    def _calls_from(self, row: Row) -> int:
        """Return how many of a denoiser's calls are wanted from this one on, as the scheduler has them."""
        total = self.session.clock.total_steps
        ticks = max(
            (len(each.timesteps) for each in self.session.system.schedulers.values() if _told(each)),
            default=1,
        )
        if total is None:
            return ticks
        steps = [self.session.clock.step_of(tick) for tick in range(row.tick, ticks)]
        rows = [row.model_copy(update={"step": step}) for step in steps]
        return max(sum(covers(self._steps, each, total) for each in rows), 1)  # type: ignore[arg-type]

    def _finish_call(self) -> None:
        if self.plan is None or self.planning:
            return
        if not self._fits:
            self.plan.check()
        # What comes after the denoiser's last call, as far as the scheduler tells, often takes most.
        if len(self._rows) >= self.plan.calls:
            self._keep_all(self._batches.rest())

    def _sample(self, row: Row, handed: Handed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the one sample's query, key and mask, of what is handed to the kernel."""
        query, key, mask = handed["query"], handed["key"], handed.get("attn_mask")
        size = query.shape[0]
        if self._row is not row or self._size != size:
            self._row, self._size, self._one = row, size, self._place(row, size)
        if mask is not None and mask.ndim == 4 and mask.shape[0] == size:
            mask = mask[self._one]
        if handed.get("is_causal"):
            mask = causal(query.shape[2], key.shape[2], query.device)
        if query.requires_grad or key.requires_grad:
            query, key = query.detach(), key.detach()
        return query[self._one], key[self._one], mask

    def _place(self, row: Row, size: int) -> slice:
        """Return where the sample stands in a batch of a layer in this call."""
        rows = row.rows(self.asked.branch, size)
        many = rows.stop - rows.start
        alone = row.samples is None or many % row.samples
        frames = [0] if alone else row.rows_of([self.asked.sample], many)
        if self.asked.frame >= len(frames):
            raise InputError(
                f"frame={self.asked.frame}: a layer attends to {len(frames)} frames by themselves, counted "
                "from 0."
            )
        first = rows.start + frames[self.asked.frame]
        return slice(first, first + 1)

    def _keep_all(self, batches: list[Batch]) -> None:
        """Compute and keep; what surrounds it, in the pipeline or after its end, makes no difference."""
        if not batches:
            return
        with torch.inference_mode(False), torch.no_grad():
            while batches:
                for path, row, value in batches.pop(0).computed(self.asked):
                    if not self.planning:
                        self._keep(path, row, value)

    def _choice(self, scope: Scope, queries: int, keys: int) -> tuple[Places, Places]:
        """Return which queries and which keys of a call are wanted."""
        asking, looked_at = self.asked.block.split("->")
        of_queries, of_keys = scope.span(asking, queries), scope.span(looked_at, keys)
        text = of_keys if looked_at == "text" else of_queries if asking == "text" else None
        if self._text is None and text is not None:
            self._read(text.stop - text.start)
        if asking == "text":
            return self._of_words(of_queries), of_keys
        places = self._positions(scope.path, of_queries) if self.asked.queries_chosen else of_queries
        return places, self._of_words(of_keys) if looked_at == "text" else of_keys

    def _read(self, length: int) -> None:
        """Learn the words of the text, and number those that are kept along the maps' axis."""
        self._words = self._text = self._watch.words(length, self.asked.sample, self.asked.branch)
        if self.asked.words is None:
            return
        chosen = [find(self._text, each) for each in self.asked.words]
        self._columns = torch.tensor([column for word in chosen for column in word.columns])
        self._words, start = [], 0
        for word in chosen:
            columns = tuple(range(start, start + len(word.columns)))
            self._words.append(replace(word, columns=columns))
            start += len(columns)

    def _of_words(self, text: slice) -> Places:
        return text if self._columns is None else self._columns + text.start

    def _positions(self, path: str, image: slice) -> Places:
        count = image.stop - image.start
        if self.asked.queries is not None:
            chosen = tuple(self.asked.queries)
            for each in chosen:
                if not 0 <= each < count:
                    raise InputError(
                        f"{path} has {count} queries of the image, from 0; {each} is none of them."
                    )
        else:
            shape = grid(count, *self._watch.aspect)
            if shape is None:
                raise InputError(f"The {count} queries of {path} form no picture; choose them by queries=….")
            chosen = tuple(_cell(x, y, shape) for x, y in self.asked.pixels or ())
        self._places[path] = chosen
        positions: torch.Tensor = torch.tensor(chosen) + image.start
        return positions

    def _note(self, path: str, row: Row) -> None:
        """Note that a layer's weights of a call are kept."""
        self._rows.setdefault(row.call, row)
        rows = self._layer_rows.setdefault(path, [])
        if rows and rows[-1].call == row.call:
            raise GuardError(
                f"{path} computes attention twice in call {row.call}, as for an image prompt or perturbed "
                "guidance, so it has no one map. Leave it out of Attention(sites=…), or switch that off."
            )
        rows.append(row)

    def _keep(self, path: str, row: Row, value: torch.Tensor) -> None:
        """Keep one layer's weights of one call, ``([heads,] queries, columns)``."""
        if self.asked.block == IMAGE_TO_TEXT:
            value = value.transpose(-1, -2)
        calls = 1 if self.plan is None else self.plan.calls
        if self.asked.top is not None:
            axis = -2 if self.asked.block == IMAGE_TO_TEXT else -1
            self._keys[path] = value.shape[axis]
            largest = value.topk(min(self.asked.top, value.shape[axis]), dim=axis)
            value = largest.values
            if path not in self._indices:
                self._indices[path] = Calls(value, calls, torch.int64)
            self._indices[path].add(largest.indices)
        self._reduction.add(path, row, value, calls)


def _told(scheduler: Any) -> bool:
    return getattr(scheduler, "timesteps", None) is not None and len(scheduler.timesteps) > 0


def _count(places: Places, total: int) -> int:
    return len(range(*places.indices(total))) if isinstance(places, slice) else len(places)


def _cell(x: float, y: float, shape: tuple[int, int]) -> int:
    """Return the position of a point of the picture, from 0 to 1 each way, in a grid."""
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"The point ({x}, {y}) is outside the picture; x and y go from 0 to 1.")
    row, column = min(int(y * shape[0]), shape[0] - 1), min(int(x * shape[1]), shape[1] - 1)
    return row * shape[1] + column
