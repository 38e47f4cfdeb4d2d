"""Watches a run's attention layers: which is computing, where its text stands, and what the text says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from workbench.attention.geometry import Scope, aspect_of, is_attention, scope_of
from workbench.attention.words import Word, reading, words_of
from workbench.errors import GuardError, UnknownNameError, nearest
from workbench.tracing.guards import check_maps
from workbench.tracing.session import Session
from workbench.tracing.sites import modules

Handed = dict[str, Any]
"""What an attention call gives to the kernel, by the names of `scaled_dot_product_attention`."""

Compute = Callable[..., torch.Tensor]
"""The kernel itself, called with such names."""

Look = Callable[[Scope, Handed, Compute], torch.Tensor | None]
"""Sees an attention call; what it returns, if anything, goes on in place of the kernel's result."""

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class Watch:
    """What is known of a run's attention while it runs.

    Args:
        session: the run.
        sites: the paths of attention layers; None is all.
        entered: called with each layer as it begins.

    Attributes:
        paths: the layers that are watched.
        aspect: how wide the pictures are to how high, as ``(width, height)``.
    """

    def __init__(
        self,
        session: Session,
        sites: Sequence[str] | None,
        *,
        entered: Callable[[Scope], None] = lambda _: None,
    ) -> None:
        self.session = session
        self._entered = entered
        self.paths: list[str] = []
        self.aspect = (1, 1)
        self._stack: list[Scope] = []
        self._outer: dict[str, dict[str, Any]] = {}
        self._readings: list[tuple[torch.Tensor, Any]] = []
        self._attach(sites)

    def looking(self, look: Look) -> TorchFunctionMode:
        """Return the mode in which each attention call of the layers is shown to ``look``."""
        return _Looking(self._stack, look)

    def words(self, length: int, sample: int = 0) -> list[Word]:
        """Return the words of one sample's text of ``length`` tokens; those nobody can tell are ``"·"``."""
        prompt = self.session.arguments.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [""])
        told = prompts[self._prompt_of(sample, len(prompts))]
        readings = [
            reading(ids[self._prompt_of(sample, len(ids))], tokenizer) for ids, tokenizer in self._readings
        ]
        return words_of(readings, length, told if isinstance(told, str) else "")

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
            self._watch_layer(path, known[path], known.get(path.rpartition(".")[0]))
        for name, component in system.components.items():
            if isinstance(component, nn.Module) and name not in system.denoisers:
                self._watch_reader(name, component)
        for denoiser in system.denoisers.values():
            rig.before(denoiser, self._see_sample)

    def _see_sample(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        self.aspect = aspect_of(sample, self.session.arguments)

    def _watch_layer(self, path: str, module: nn.Module, block: nn.Module | None) -> None:
        rig = self.session.rig
        if block is not None:
            rig.before(block, lambda _module, _args, kwargs: self._outer.__setitem__(path, kwargs))
        joint = getattr(module, "add_k_proj", None) is not None

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scope = scope_of(path, kwargs, args, self._outer.get(path, {}))
            scope.mixed = scope.mixed or (joint and scope.text > 0)
            self._stack.append(scope)
            self._entered(scope)

        def leave(*_: Any) -> None:
            self._stack.pop()

        def note_text(_module: nn.Module, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
            if self._stack:
                self._stack[-1].text_keys = output

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
            first = all(known is not tokenizer for _, known in self._readings)
            if first and isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point():
                self._readings.append((ids, tokenizer))

        self.session.rig.before(component, read)


class _Looking(TorchFunctionMode):
    """Sees attention calls and how joint sequences are put together."""

    def __init__(self, stack: list[Scope], look: Look) -> None:
        super().__init__()
        self.stack = stack
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stack = self.stack
        if stack:
            if func is functional.scaled_dot_product_attention:
                handed = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
                scope, query, key = stack[-1], handed["query"], handed["key"]
                if scope.joins_by_itself(query.shape[2], key.shape[2]):
                    raise GuardError(
                        f"{scope.path} puts image and text together by itself, and which is which is not "
                        "known. Read its weights at the port probs, or leave it out of sites."
                    )
                changed = self.look(scope, handed, func)
                if changed is not None:
                    return changed
            elif func is torch.cat:
                stack[-1].see_cat(args[0] if args else kwargs.get("tensors", ()))
        return func(*args, **kwargs)
