"""Parallel schemes: what a component's entry may say, and whether it can be done here.

The keys are those of NeMo AutoModel's ``NeMoAutoDiffusionPipeline``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import pydantic
import torch
import torch.distributed as dist
from pydantic.dataclasses import dataclass
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor.parallel import ParallelStyle

from workbench.errors import InputError, UnknownNameError, nearest

_CONFIG = pydantic.ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
_KIND = "_manager_type"

Size = Annotated[int, pydantic.Field(ge=1)]
"""A number of ranks."""


@dataclass(config=_CONFIG)
class Scheme:
    """What every scheme says.

    Attributes:
        activation_checkpointing: compute activations again in training instead of keeping them.
        backend: of the process group; None is ``nccl`` on CUDA and ``gloo`` on a CPU.
        world_size: how many ranks there are; None is as many as there are.
    """

    activation_checkpointing: bool = False
    backend: str | None = None
    world_size: Size | None = None

    def check(self, component: str, world: int, device: torch.device) -> None:
        """Refuse what cannot be done by ``world`` ranks on such a device.

        Raises:
            InputError: with the component, what does not fit, and what would.
        """
        if self.world_size not in (None, world):
            raise InputError(f"{component}: world_size={self.world_size}, but there are {world} ranks.")
        for each in (self.backend or "").split(",") if self.backend is not None else ():
            if each.rpartition(":")[2].lower() not in dist.Backend.backend_list:
                known = [name for name in dist.Backend.backend_list if name != "undefined"]
                raise UnknownNameError(f"{component}: no backend {self.backend!r}.{nearest(each, known)}")
        if self.backend == "nccl" and device.type == "cpu":
            raise InputError(f"{component}: backend='nccl' is for CUDA; on a CPU it is 'gloo'.")

    def keeps_on(self, device: torch.device) -> torch.device:
        """Return where a component's parameters are kept."""
        return device


@dataclass(config=_CONFIG)
class DDP(Scheme):
    """Every rank holds the whole component, and they exchange gradients: for training only."""


@dataclass(config=_CONFIG)
class FSDP2(Scheme):
    """Every rank holds a shard of each parameter, and they gather a block when it is called.

    Attributes:
        dp_size: ranks over which data is spread; None is what the other sizes leave.
        dp_replicate_size: groups of ranks that each hold a whole copy in shards.
        tp_size: ranks over which single layers are split, as ``tp_plan`` says.
        cp_size: ranks over which the sequence is split in attention.
        pp_size: stages of a pipeline of ranks.
        ep_size: ranks over which experts are spread.
        mp_policy: in which dtypes to compute and to reduce; None is that of the weights.
        sequence_parallel: allow ``"sequence"`` in the plan: norms on a part of the sequence each.
        tp_plan: by path in the component, ``*`` for any part of it, ``"colwise"``, ``"rowwise"``,
            ``"sequence"`` or a ``ParallelStyle`` of torch.
        offload_policy: keep shards in the CPU's memory; True is torch's ``CPUOffloadPolicy``, with pinned
            memory where there is an accelerator.
        defer_fsdp_grad_sync: exchange gradients only in the last of several backward passes.
    """

    dp_size: Size | None = None
    dp_replicate_size: Size | None = None
    tp_size: Size | None = 1
    cp_size: Size | None = 1
    pp_size: Size | None = 1
    ep_size: Size | None = 1
    mp_policy: MixedPrecisionPolicy | None = None
    sequence_parallel: bool = False
    tp_plan: dict[str, Any] | None = None
    offload_policy: OffloadPolicy | bool | None = None
    defer_fsdp_grad_sync: bool = True

    def check(self, component: str, world: int, device: torch.device) -> None:
        """Refuse what cannot be done by ``world`` ranks on such a device."""
        super().check(component, world, device)
        for name, why in _UNSPLIT.items():
            if (getattr(self, name) or 1) > 1:
                raise InputError(f"{component}: {name}={getattr(self, name)} cannot be done: {why}")
        if (self.tp_size or 1) > 1 and not self.tp_plan:
            raise InputError(
                f"{component}: tp_size={self.tp_size} needs a tp_plan, which layers are split and how: "
                "{'blocks.*.ffn.net.0.proj': 'colwise', 'blocks.*.ffn.net.2': 'rowwise'}."
            )
        if self.tp_plan and (self.tp_size or 1) == 1:
            raise InputError(f"{component}: a tp_plan splits nothing with tp_size=1.")
        for path, style in (self.tp_plan or {}).items():
            if not isinstance(style, (str, ParallelStyle)):
                raise InputError(f"{component}: {style!r} at {path} is no style: {', '.join(STYLES)}.")
            if isinstance(style, str) and style not in STYLES:
                raise UnknownNameError(f"{component}: no style {style!r} at {path}.{nearest(style, STYLES)}")
            if style == "sequence" and not self.sequence_parallel:
                raise InputError(f"{component}: 'sequence' at {path} needs sequence_parallel=True.")
        if getattr(self.offloading, "pin_memory", False) and not torch.accelerator.is_available():
            raise InputError(
                f"{component}: offload_policy={self.offload_policy} pins memory, and there is no accelerator "
                "to pin it for: CPUOffloadPolicy(pin_memory=False), or True."
            )
        sizes = self.sizes(component, world)
        if sizes["dp_replicate"] * sizes["dp_shard"] == 1 and (self.mp_policy or self.offload_policy):
            raise InputError(
                f"{component}: mp_policy and offload_policy are about shards, and tp_size={self.tp_size} on "
                f"{world} ranks leaves none."
            )

    def sizes(self, component: str, world: int) -> dict[str, int]:
        """Return the sizes of the mesh of ranks: ``dp_replicate``, ``dp_shard`` and ``tp``.

        Raises:
            InputError: they do not multiply to the number of ranks.
        """
        split = self.tp_size or 1
        given = {name: getattr(self, name) for name in ("dp_size", "dp_replicate_size", "tp_size")}
        said = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        copies = self.dp_replicate_size or 1
        spread = self.dp_size or max(world // split, 1)
        found = {"dp_replicate": copies, "dp_shard": max(spread // copies, 1), "tp": split}
        if min(split, copies, spread) < 1 or math.prod(found.values()) != world or spread % copies:
            raise InputError(
                f"{component}: {said} does not fit {world} ranks: dp_size × tp_size must be {world}, and "
                "dp_size a multiple of dp_replicate_size."
            )
        if copies > 1 and copies == spread:
            raise InputError(
                f"{component}: dp_replicate_size={copies} leaves nothing to shard; whole copies on each rank "
                "are {'_manager_type': 'ddp'}."
            )
        return found

    def keeps_on(self, device: torch.device) -> torch.device:
        """Return where a component's parameters are kept: on the CPU if that is the policy."""
        return torch.device("cpu") if isinstance(self.offloading, CPUOffloadPolicy) else device

    @property
    def offloading(self) -> OffloadPolicy:
        """The policy of torch for where shards are kept."""
        if isinstance(self.offload_policy, OffloadPolicy):
            return self.offload_policy
        pinned = torch.accelerator.is_available()
        return CPUOffloadPolicy(pin_memory=pinned) if self.offload_policy else OffloadPolicy()


STYLES = ("colwise", "rowwise", "sequence")
"""Names of the styles of a ``tp_plan``."""

_UNSPLIT = {
    "cp_size": "attention over a split sequence needs CUDA's kernels, and is not offered here. Set it to 1.",
    "pp_size": "a diffusers model is no chain of stages. Set it to 1.",
    "ep_size": "only experts can be spread, and the denoisers of diffusers have none. Set it to 1.",
}
_KINDS: dict[str, type[Scheme]] = {"fsdp2": FSDP2, "ddp": DDP}


def read(scheme: Mapping[str, Any], components: Iterable[str]) -> dict[str, Scheme]:
    """Read a parallel scheme.

    Args:
        scheme: by component, ``_manager_type`` (``"fsdp2"`` or ``"ddp"``, fsdp2 if it is not given) and the
            attributes of `FSDP2` or `DDP`.
        components: what there is to parallelise.

    Raises:
        UnknownNameError: no such component, manager or key.
        InputError: a value of another type.
    """
    return {name: _entry(name, given, list(components)) for name, given in scheme.items()}


def _entry(name: str, given: Any, components: list[str]) -> Scheme:
    if name not in components:
        raise UnknownNameError(
            f"parallel_scheme names {name!r}, which is no module of this pipeline.{nearest(name, components)}"
        )
    if not isinstance(given, Mapping):
        raise InputError(f"{name}: a scheme is a dict such as {{'_manager_type': 'fsdp2'}}, not {given!r}.")
    keys = {str(key): value for key, value in given.items()}
    manager = keys.pop(_KIND, "fsdp2")
    kind = _KINDS.get(str(manager).lower())
    if kind is None:
        raise UnknownNameError(f"{name}: no {_KIND} {manager!r}.{nearest(str(manager), _KINDS)}")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in keys:
        if key not in known:
            raise UnknownNameError(
                f"{name}: a {manager} scheme has no key {key!r}.{nearest(key, known)} "
                f"It has {', '.join(known)}."
            )
    try:
        return kind(**keys)
    except pydantic.ValidationError as error:
        wrong = "; ".join(f"{each['loc'][0]}={each['input']!r}: {each['msg']}" for each in error.errors())
        raise InputError(f"{name}: {wrong}.") from None
