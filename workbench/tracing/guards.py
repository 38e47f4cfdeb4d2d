"""Settings of a model under which hooks, maps or forks would be wrong: refused by name, before the run.

*Sites* are those inside the denoiser, *maps* is `Attention` and the ports ``query``, ``key``, ``value`` of a
layer, *forks* is `Record.fork`.

| setting | sites | maps | forks | why |
|---|---|---|---|---|
| nothing set | works | works | works | |
| attention slicing | works | refused | works | scores are computed slice by slice, past the fused kernel |
| other attention processor | works | refused | works | `AttnProcessor`, xformers and such pass it by |
| native attention backend | works | works | works | another of torch's own kernels behind the same function |
| other attention backend | works | refused | works | flex, flash, sage pass scaled_dot_product_attention by |
| fused projections | works | works | works | but `to_q`, `to_k`, `to_v` are no longer called: refused there |
| torch.compile | refused | refused | works | hooks inside never fire; the denoiser itself can be traced |
| compiled in place | refused | refused | refused | `module.compile()` would compile our hooks as well |
| compiled blocks | refused | refused | works | inside the blocks; what lies outside of them can be traced |
| FirstBlockCache | refused | refused | refused | skips blocks; the denoiser itself can be traced |
| PyramidAttentionBroadcast | refused | refused | refused | skips attention layers, the same |
| FasterCache | refused | refused | refused | skips attention and rows of the batch, the same |
| model CPU offload | works | works | works | accelerate moves modules inside of our hooks |
| sequential CPU offload | works | works | works | weights are on `meta` between calls; we read none |
| group offload | works | works | works | the same |
| layerwise casting | works | works | works | values pass in the compute dtype |
| quantised weights | works | works | works | values pass in the compute dtype |
| LoRA | works | works | works | the adapted layers are modules like others |
| modular pipeline | works | works | works | components and scheduler are the same |

Derivatives are refused under gradient checkpointing: it computes parts of a call again on the way back, when
nothing of the run is there to make its changes. A loop written by hand may take them itself, so there it is a
call with gradients on that is refused.

A module in TorchScript takes no hooks: it is refused where it is asked for, and runs unseen where it is not.

A cached denoiser cannot be forked since replay stands in for its forward, and the cache would lack what
the repeated steps put there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from torch import nn

from workbench.errors import GuardError
from workbench.tracing.sites import Site, child

KERNEL_PORTS = ("query", "key", "value")
"""Ports of what an attention layer hands to the kernel."""

_KERNEL = "scaled_dot_product_attention"
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_WAYS_OUT = {
    "Sliced": "pipeline.disable_attention_slicing()",
    "XFormers": "pipeline.disable_xformers_memory_efficient_attention()",
}
_RUNS_THE_MODULE = ("PeftInputAutocastDisableHook",)
"""Hooks of diffusers that have a forward of their own but always run the module's."""


@dataclass(frozen=True)
class Place:
    """A module that is asked for, and those it lies in: ``(path, module)``, the component first."""

    around: tuple[tuple[str, nn.Module], ...]

    @classmethod
    def at(cls, components: Mapping[str, Any], path: str) -> Place:
        """Find the module at ``path``; what is no module (a method, a scheduler) is left out."""
        name, *rest = path.split(".")
        found, at, module = [], name, components.get(name)
        while isinstance(module, nn.Module):
            found.append((at, module))
            if not rest:
                break
            at, module = f"{at}.{rest[0]}", child(module, rest.pop(0))
        return cls(tuple(found))

    @property
    def path(self) -> str:
        """The path of the module that is asked for."""
        return self.around[-1][0]

    @property
    def module(self) -> nn.Module:
        """The module that is asked for."""
        return self.around[-1][1]

    @property
    def component(self) -> str:
        """The name of the component it belongs to."""
        return self.around[0][0]


Guard = Callable[[Place], str | None]
"""Says what is wrong with a place and what to do, or None."""


def check(components: Mapping[str, Any], sites: Iterable[Site]) -> None:
    """Refuse sites where a hook would miss values, or see others than it is asked for.

    Raises:
        GuardError: with the site, the setting and what to switch off.
    """
    for site in sites:
        place = Place.at(components, site.path)
        # Hundreds of sites in one run are no rarity, and modules with a setting of any kind are.
        settings = (
            () if all(_as_built(module) for _, module in place.around) else (_compiled, _cached, _fused)
        )
        kernel = (_bypassed,) if site.port in (*KERNEL_PORTS, "probs") else ()
        _refuse(place, (*settings, *kernel))


def check_maps(components: Mapping[str, Any], layers: Iterable[str], *, by_name: bool = False) -> None:
    """Refuse attention layers whose queries and keys cannot be seen on their way to the kernel.

    Args:
        components: the model's parts.
        layers: paths of attention layers.
        by_name: whether the user named them; if not, those that attend to no text are let pass.

    Raises:
        GuardError: with the layer, its processor or backend, and what to switch off.
    """
    for path in layers:
        _refuse(Place.at(components, path), (_compiled, _cached, _bypassed if by_name else _bypassed_by_text))


def check_denoisers(denoisers: Mapping[str, nn.Module], *, forking: bool = False) -> None:
    """Refuse to run denoisers whose calls cannot be counted, or to fork those that remember.

    Raises:
        GuardError: with the denoiser and what to switch off.
    """
    for name in denoisers:
        _refuse(Place.at(denoisers, name), (_compiled_in_place, *((_remembers,) if forking else ())))


def check_graph(denoisers: Mapping[str, nn.Module]) -> None:
    """Refuse derivatives through denoisers that compute parts of a call again by themselves.

    Raises:
        GuardError: with the denoiser and what to switch off.
    """
    for name, module in denoisers.items():
        if any(getattr(each, "gradient_checkpointing", False) for each in module.modules()):
            raise GuardError(
                f"{name} has gradient checkpointing on: on the way back it would compute its blocks again "
                "without the run's changes. `DiffusionModel.gradient` saves memory by itself. Switch it off: "
                f"model.{name}.module.disable_gradient_checkpointing(). A loop of your own that takes no "
                "derivatives can also call it under torch.no_grad()."
            )


def hookable(components: Mapping[str, Any], path: str) -> bool:
    """Whether a hook at ``path`` fires and changes nothing: not inside of what is compiled."""
    return _compiled(Place.at(components, path)) is None


def _refuse(place: Place, guards: Iterable[Guard]) -> None:
    for guard in guards if place.around else ():
        message = guard(place)
        if message is not None:
            raise GuardError(message)


def _as_built(module: nn.Module) -> bool:
    """Whether nothing has been set on a module that `_compiled`, `_cached` or `_fused` look for."""
    own = vars(module)
    return not (
        isinstance(module, torch.jit.ScriptModule)
        or type(module).__name__ == "OptimizedModule"
        or own.get("_compiled_call_impl") is not None
        or "_diffusers_hook" in own
        or own.get("fused_projections", False)
    )


def _compiled(place: Place) -> str | None:
    for path, module in place.around:
        if isinstance(module, torch.jit.ScriptModule):
            return (
                f"{path} is TorchScript, which takes no hooks. Trace what lies outside of it, or put the "
                "module that it was made of in its place."
            )
        wrapped = type(module).__name__ == "OptimizedModule"
        outside = wrapped and path == place.path
        if not outside and (wrapped or _compiles_itself(module)) and not _runs_eagerly():
            return (
                f"{path} is compiled: a hook on {place.path} would never fire. Trace what lies outside of "
                f"{path}, or run uncompiled: with torch.compiler.set_stance('force_eager'): …"
            )
    return None


def _compiled_in_place(place: Place) -> str | None:
    if not _compiles_itself(place.module) or _runs_eagerly():
        return None
    return (
        f"{place.path} was compiled in place by {place.path}.compile(), which would compile our hooks with "
        f"it. Compile it as pipeline.{place.path} = torch.compile(pipeline.{place.path}), or run "
        "uncompiled: with torch.compiler.set_stance('force_eager'): …"
    )


def _cached(place: Place) -> str | None:
    for path, module in place.around:
        names = [name for name, hook in _hooks(module).items() if _replaces_forward(hook)]
        # The denoiser itself is called each time, and returns what the pipeline goes on with.
        if names and place.path != place.component:
            return (
                f"{path} has a cache that skips what is inside, so {place.path} would pass in some calls "
                f"only. {_uncache(place, path, names[0])}"
            )
    return None


def _remembers(place: Place) -> str | None:
    for path, module in place.module.named_modules(prefix=place.path):
        for name, hook in _hooks(module).items():
            if _replaces_forward(hook):
                return (
                    f"{path} has a cache, which a fork would find empty at its step: it would not be the "
                    f"same run. {_uncache(place, path, name)}"
                )
    return None


def _fused(place: Place) -> str | None:
    for (path, module), (inner, _) in pairwise(place.around):
        if not vars(module).get("fused_projections", False) or "to_v" in _names(module):
            continue
        name = inner.rpartition(".")[2]
        for fused, parts in _FUSED.items():
            if name in parts and hasattr(module, fused):
                return (
                    f"{path} has fused projections: it calls {fused} and never {name}. Ask for "
                    f"{path}.{fused}, or switch them off: {place.component}.unfuse_qkv_projections()."
                )
    return None


def _bypassed(place: Place) -> str | None:
    processor, names = getattr(place.module, "processor", None), _names(place.module)
    if "dispatch_attention_fn" in names:
        backend, function = _backend(processor)
        if _KERNEL in _named_in(function):
            return None
        return (
            f"{place.path} computes attention in the backend {backend!r}, past {_KERNEL}, where maps, "
            "queries, keys and values are taken from. Switch to torch's own: "
            f"{place.component}.set_attention_backend('native')."
        )
    kind = type(processor)
    if _KERNEL in names or not (kind.__module__.startswith("diffusers.") or "get_attention_scores" in names):
        return None
    way_out = f"{place.component}.set_attn_processor(AttnProcessor2_0()), or whichever it had"
    way_out = next((way for word, way in _WAYS_OUT.items() if kind.__name__.startswith(word)), way_out)
    return (
        f"{place.path} computes attention in {kind.__name__}, past {_KERNEL}, where maps, queries, "
        f"keys and values are taken from. Switch it off: {way_out}."
    )


def _bypassed_by_text(place: Place) -> str | None:
    return None if _sees_no_text(place.module) else _bypassed(place)


def _compiles_itself(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _runs_eagerly() -> bool:
    from torch._dynamo import eval_frame

    return bool(eval_frame._stance.stance == "force_eager")


def _hooks(module: nn.Module) -> Mapping[str, Any]:
    """Return the hooks that diffusers itself has put on a module, which run inside of ours."""
    # Looked up in its own dictionary: for what is not there a module searches long, and many are asked.
    hooks: Mapping[str, Any] = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    return hooks


def _replaces_forward(hook: Any) -> bool:
    return hasattr(hook, "new_forward") and type(hook).__name__ not in _RUNS_THE_MODULE


def _uncache(place: Place, path: str, name: str) -> str:
    if getattr(place.around[0][1], "is_cache_enabled", False):
        return f"Switch it off: {place.component}.disable_cache()."
    return f"Take it off: {path}._diffusers_hook.remove_hook({name!r})."


def _sees_no_text(module: nn.Module) -> bool:
    """Whether a layer is known to attend to nothing but what it is given."""
    joint = getattr(module, "add_k_proj", None) is not None
    return not joint and getattr(module, "is_cross_attention", None) is False


def _backend(processor: Any) -> tuple[str, Any]:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    asked = getattr(processor, "_attention_backend", None)
    active = _AttentionBackendRegistry.get_active_backend()[0] if asked is None else asked
    name = AttentionBackendName(active)
    return str(name.value), _AttentionBackendRegistry._backends.get(name)


def _names(attention: nn.Module) -> frozenset[str]:
    """Return what the code of a layer's processor calls by name."""
    processor = getattr(attention, "processor", None)
    if not inspect.isfunction(processor):
        processor = inspect.getattr_static(type(processor), "__call__", None)
    return _named_in(processor)


def _named_in(function: Any) -> frozenset[str]:
    code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
    return frozenset(name for each in _codes(code) for name in each.co_names)


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    if code is not None:
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from _codes(inner)
