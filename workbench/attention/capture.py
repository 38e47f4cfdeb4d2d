"""Captures attention while the pipeline's own fused kernels compute it.

A torch function mode sees each call of scaled dot product attention with the very queries and keys
the kernel gets (after rotary embeddings and normalisation) and computes from them, aside, the
softmax columns that were asked for. The kernel's own result goes on untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from workbench.attention.geometry import Scope, is_attention, scope_of
from workbench.attention.maps import AttentionMaps
from workbench.attention.words import Reading, reading, words_of
from workbench.errors import GuardError, InputError, UnknownNameError, nearest
from workbench.tracing.guards import check_maps
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.sites import modules
from workbench.tracing.steps import Steps, covers, normal

_CHUNK = 1 << 24
"""How many softmax weights are computed at once at the most."""


@dataclass
class Attention:
    """Asks a run for its attention from image to text, averaged over heads.

    Give it in ``capture``; the maps are then ``record.attention``, an `AttentionMaps`.

    Attributes:
        sites: module paths of attention layers; None is every one that attends to text.
        steps: which steps; None is every step.
        branch: which guidance branch.
        dtype: how the maps are stored; they are computed in float32.
    """

    sites: Sequence[str] | None = None
    steps: Steps = None
    branch: str = "cond"
    dtype: torch.dtype = torch.float32
    _run: _Run | None = field(default=None, init=False, repr=False)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the attention layers of a run."""
        run = _Run(self, session)
        run.attach()
        self._run = run
        session.rig.enter(_Intercept(run))
        yield

    def deliver(self, record: Record) -> None:
        """Put the maps into the record."""
        run, self._run = self._run, None
        if run is None:
            return
        layers = {path: torch.stack(maps) for path, maps in run.maps.items()}
        for path in self.sites or ():
            if path in run.wordless and path not in layers:
                raise InputError(f"{path} does not attend to text, so there is no map of words.")
        for path in run.worded - run.seen:
            raise GuardError(
                f"{path} attends to text, but never through scaled_dot_product_attention, where maps are "
                "taken from. Give it a processor that calls it, such as AttnProcessor2_0."
            )
        length = max((maps.shape[1] for maps in layers.values()), default=0)
        words = words_of(run.readings, length)
        record.attention = AttentionMaps(layers, list(run.rows.values()), words, run.layer_rows)


class _Run:
    """One run's attention capture."""

    def __init__(self, asked: Attention, session: Session) -> None:
        self.asked = asked
        self.session = session
        self.steps = normal(asked.steps)
        self.stack: list[Scope] = []
        self.outer: dict[str, dict[str, Any]] = {}
        self.maps: dict[str, list[torch.Tensor]] = {}
        self.rows: dict[int, Row] = {}
        self.layer_rows: dict[str, list[Row]] = {}
        self.wordless: set[str] = set()
        self.readings: list[Reading] = []
        self.worded: set[str] = set()
        self.seen: set[str] = set()

    def attach(self) -> None:
        known = modules(self.session.system.denoisers)
        layers = [path for path, module in known.items() if is_attention(module)]
        wanted = self.asked.sites if self.asked.sites is not None else layers
        check_maps(self.session.system.components, wanted, by_name=self.asked.sites is not None)
        for path in wanted:
            if path not in layers:
                raise UnknownNameError(f"{path!r} is no attention layer.{nearest(path, layers)}")
            self._watch_layer(path, known[path], known.get(path.rpartition(".")[0]))
        for name, component in self.session.system.components.items():
            if isinstance(component, nn.Module) and name not in self.session.system.denoisers:
                self._watch_reader(name, component)

    def wanted_row(self) -> Row | None:
        """Return the ledger row of this call if it is wanted."""
        row = self.session.clock.row
        if row is None or self.session.replaying(row) or not row.has(self.asked.branch):
            return None
        return row if covers(self.steps, row, self.session.clock.total_steps) else None

    def keep(self, path: str, row: Row, weights: torch.Tensor) -> None:
        """Keep one layer's weights of one call, ``(tokens, queries)``."""
        self.rows.setdefault(row.call, row)
        rows = self.layer_rows.setdefault(path, [])
        if row in rows[-1:]:
            raise GuardError(
                f"{path} computes attention twice in call {row.call}, as for an image prompt or perturbed "
                "guidance, so it has no one map. Leave it out of Attention(sites=…), or switch that off."
            )
        rows.append(row)
        self.maps.setdefault(path, []).append(weights.to("cpu", self.asked.dtype))

    def _watch_layer(self, path: str, module: nn.Module, block: nn.Module | None) -> None:
        rig = self.session.rig
        if block is not None:
            rig.before(block, lambda _module, _args, kwargs: self.outer.__setitem__(path, kwargs))
        joint = getattr(module, "add_k_proj", None) is not None

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scope = scope_of(path, kwargs, args, self.outer.get(path, {}))
            scope.mixed = scope.mixed or (joint and scope.text > 0)
            self.stack.append(scope)
            if scope.text:
                self.worded.add(path)

        def leave(*_: Any) -> None:
            self.stack.pop()

        def note_text(_module: nn.Module, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
            if self.stack:
                self.stack[-1].text_keys = output

        rig.before(module, enter)
        rig.after(module, leave)
        for name in ("add_k_proj", "to_added_qkv", "norm_added_k"):
            if isinstance(getattr(module, name, None), nn.Module):
                rig.after(getattr(module, name), note_text)

    def _watch_reader(self, name: str, component: nn.Module) -> None:
        tokenizer = self.session.system.components.get(name.replace("text_encoder", "tokenizer"))
        if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
            return

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            first = all(each.tokenizer is not tokenizer for each in self.readings)
            if first and isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point():
                self.readings.append(reading(ids, tokenizer))

        self.session.rig.before(component, read)


class _Intercept(TorchFunctionMode):
    """Sees attention calls and how joint sequences are put together."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stack = self.run.stack
        if stack:
            if func is functional.scaled_dot_product_attention:
                self._look(stack[-1], *args, **kwargs)
            elif func is torch.cat:
                stack[-1].see_cat(args[0] if args else kwargs.get("tensors", ()))
        return func(*args, **kwargs)

    def _look(self, scope: Scope, query: torch.Tensor, key: torch.Tensor, *_: Any, **kwargs: Any) -> None:
        self.run.seen.add(scope.path)
        if not scope.text:
            self.run.wordless.add(scope.path)
            return
        row = self.run.wanted_row()
        if row is None:
            return
        rows = row.rows(self.run.asked.branch, query.shape[0])
        mask = kwargs.get("attn_mask", _[1] if len(_) > 1 else None)
        if mask is not None and mask.ndim == 4 and mask.shape[0] == query.shape[0]:
            mask = mask[rows]
        weights = head_mean(
            query[rows],
            key[rows],
            queries=scope.queries(query.shape[2]),
            columns=scope.columns(key.shape[2]),
            scale=kwargs.get("scale"),
            mask=mask,
        )
        self.run.keep(scope.path, row, weights[0].T)


@torch.no_grad()
def head_mean(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    queries: slice,
    columns: slice,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the softmax weights of some columns, averaged over heads, in float32.

    Queries are taken a stretch at a time, so the whole matrix never exists.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key: ``(batch, heads, keys, head_dim)``; fewer heads are repeated (grouped queries).
        queries: which queries.
        columns: which keys to return; the softmax is over all of them.
        scale: of the dot products; None is 1/√head_dim.
        mask: boolean or additive, broadcastable to ``(batch, heads, queries, keys)``.

    Returns:
        Weights in [0, 1], ``(batch, queries, columns)``.
    """
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wanted, keys = query[:, :, queries].float(), key.float().transpose(-1, -2)
    chunk = max(_CHUNK // max(query.shape[0] * query.shape[1] * key.shape[2], 1), 1)
    parts = []
    for start in range(0, wanted.shape[2], chunk):
        logits = wanted[:, :, start : start + chunk] @ keys * factor
        if mask is not None:
            logits = _masked(
                logits, mask, slice(queries.start + start, queries.start + start + logits.shape[2])
            )
        parts.append(logits.softmax(-1)[..., columns].mean(1))
    return torch.cat(parts, dim=1)


def _masked(logits: torch.Tensor, mask: torch.Tensor, queries: slice) -> torch.Tensor:
    part = mask[..., queries, :] if mask.ndim > 1 and mask.shape[-2] > 1 else mask
    return logits.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits + part.float()
