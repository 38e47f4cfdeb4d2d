"""Watches a run's attention layers: which is computing, where its text stands, and what the text says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from workbench.attention.geometry import Given, Scope, aspect_of, by_name, is_attention, unknown_order
from workbench.attention.tap import Handed, Look, Rest, Tap
from workbench.attention.words import Word, closest, reading, silent, words_of
from workbench.errors import UnknownNameError, nearest
from workbench.tracing.guards import check_maps, hookable
from workbench.tracing.session import Session
from workbench.tracing.sites import modules


class Watch:
    """What is known of a run's attention while it runs.

    Args:
        session: the run.
        sites: the paths of attention layers; None is all.
        turn: when it is this watch's turn (see `tap`).
        wants: called with each layer as it begins: whether its kernel calls are to be shown.
        look: shown these calls.

    Attributes:
        paths: the layers that are watched.
        aspect: how wide the pictures are to how high, as ``(width, height)``.
    """

    def __init__(
        self,
        session: Session,
        sites: Sequence[str] | None,
        *,
        turn: int,
        wants: Callable[[Scope], bool],
        look: Look,
    ) -> None:
        self.session = session
        self._wants = wants
        self._look = look
        self._turn = turn
        self.paths: list[str] = []
        self.aspect = (1, 1)
        self._given = Given()
        self._read: dict[str, list[torch.Tensor]] = {}
        self._attach(sites)

    def words(self, length: int, sample: int = 0, branch: str = "cond") -> list[Word]:
        """Return the words of one sample's text of ``length`` tokens; those nobody can tell are ``"·"``.

        The text of the branch ``uncond`` is the negative prompt, or nothing.
        """
        readings = []
        for name, calls in self._read.items():
            told, tokenizer = self._told(name, sample, branch), self.session.system.components[name]
            rows = [row for ids in calls for row in ids]
            if told:
                mine: torch.Tensor | None = closest(rows, tokenizer, told)
            elif branch == "uncond":
                mine = silent(rows, tokenizer)
            else:
                mine = calls[0][self._prompt_of(sample, len(calls[0]))]
            if mine is not None:
                readings.append(reading(mine, tokenizer))
        return words_of(readings, length, self._told("tokenizer", sample, branch))

    def _told(self, tokenizer: str, sample: int, branch: str) -> str:
        """Return what a tokenizer was given of one sample; empty if that is not known."""
        arguments, called = self.session.arguments, "negative_prompt" if branch == "uncond" else "prompt"
        prompt = arguments.get(tokenizer.replace("tokenizer", called)) or arguments.get(called)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        told = prompts[self._prompt_of(sample, len(prompts))]
        return told if isinstance(told, str) else ""

    def _prompt_of(self, sample: int, prompts: int) -> int:
        """Return which of the prompts a sample is made of: each has all its images one after the other."""
        samples = max(self.session.clock.rows or 1, prompts)
        return sample % samples * prompts // samples

    def _attach(self, sites: Sequence[str] | None) -> None:
        system, rig = self.session.system, self.session.rig
        known = modules(system.denoisers)
        layers = [path for path, module in known.items() if is_attention(module)]
        self.paths = list(layers if sites is None else sites)
        check_maps(system.components, self.paths, by_name=sites is not None)
        for path in self.paths:
            if path not in layers:
                raise UnknownNameError(f"{path!r} is no attention layer.{nearest(path, layers)}")
            tap = Tap.on(rig, known[path])
            tap.locate(path, known.get(path.rpartition(".")[0]))
            tap.add(self._turn, self._see, self._wanted)
        for name, component in system.components.items():
            other = isinstance(component, nn.Module) and name not in system.denoisers
            if other and hookable(system.components, name):
                self._watch_reader(name, component)
        for denoiser in system.denoisers.values():
            rig.before(denoiser, self._see_sample)

    def _see_sample(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = by_name(denoiser, args, kwargs)
        self._given = Given.to(denoiser, named)
        self.aspect = aspect_of(named.get("sample", named.get("hidden_states")), self.session.arguments)

    def _wanted(self, scope: Scope) -> bool:
        scope.of_image = self._given.of_image(scope)
        return self._wants(scope)

    def _see(self, scope: Scope, handed: Handed, rest: Rest) -> torch.Tensor | None:
        if scope.joins_by_itself(handed["query"].shape[2], handed["key"].shape[2]):
            raise unknown_order(scope.path)
        return self._look(scope, handed, rest)

    def _watch_reader(self, name: str, component: nn.Module) -> None:
        told = name.replace("text_encoder", "tokenizer")
        tokenizer = self.session.system.components.get(told)
        if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
            return

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point():
                self._read.setdefault(told, []).append(ids)

        self.session.rig.before(component, read)
