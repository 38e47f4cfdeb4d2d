"""Managers: each spreads one component over the ranks, and keeps how it did."""

from __future__ import annotations

import datetime
import fnmatch
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from workbench.errors import InputError, UnknownNameError
from workbench.models.parallel.schemes import DDP, FSDP2, Scheme

Strategy = Callable[[nn.Module, DeviceMesh, FSDP2], None]
"""Shards a module in place over a mesh whose dimensions are those of data parallelism."""

_STRATEGIES: dict[str, Strategy] = {}
_CALLED_BESIDE = {"DiTTransformer2DModel": ("transformer_blocks.0.norm1.emb",)}
"""By class, what lies in a block and is called without it, so that it must gather its own parameters."""

_PATIENCE = datetime.timedelta(minutes=5)


def register_strategy(transformer_cls: str, strategy: Strategy) -> None:
    """Have a class of denoisers sharded in a way of its own.

    Args:
        transformer_cls: the class's name, ``"WanTransformer3DModel"``.
        strategy: called with the module, the mesh and the scheme, in place of wrapping each repeated block.
    """
    _STRATEGIES[transformer_cls] = strategy


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is given, this rank's CUDA device, or the CPU.

    Raises:
        InputError: torch has no such device, or this machine has not.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device={device!r} is none of torch's: {str(error).splitlines()[0]}") from None
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={str(found)!r}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return found


def ranks() -> int:
    """Return how many ranks there are.

    Raises:
        InputError: this process was not started as one of several.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise InputError(
            "A parallel scheme spreads a model over several processes, and this is one alone. Start them "
            "together: torchrun --nproc-per-node 2 script.py"
        )
    return int(os.environ["WORLD_SIZE"])


def connect(backend: str | None, device: torch.device) -> None:
    """Join the ranks, if that has not been done."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"), timeout=_PATIENCE)


class FSDP2Manager:
    """Shards a component's parameters over the ranks, block by block.

    Attributes:
        scheme: what was asked for.
        device_mesh: the ranks, by ``dp_replicate``, ``dp_shard`` and ``tp``.
    """

    def __init__(self, component: str, scheme: FSDP2, world: int, device: torch.device) -> None:
        self.scheme = scheme
        sizes = scheme.sizes(component, world)
        self.device_mesh = init_device_mesh(
            device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes.keys())
        )

    def parallelize(self, module: nn.Module) -> nn.Module:
        """Shard a module in place, on ``meta`` or with its weights; hooks belong on it afterwards."""
        if self.scheme.tp_plan:
            _split_layers(module, self.device_mesh["tp"], self.scheme.tp_plan)
        copies, shards = self.device_mesh["dp_replicate"].size(), self.device_mesh["dp_shard"].size()
        if copies * shards > 1:
            mesh = (
                self.device_mesh["dp_replicate", "dp_shard"] if copies > 1 else self.device_mesh["dp_shard"]
            )
            _STRATEGIES.get(type(module).__name__, shard_blocks)(module, mesh, self.scheme)
        if self.scheme.activation_checkpointing:
            checkpoint_activations(module)
        return module

    def share_noise(self) -> None:
        """Let every rank draw from torch's own generators what the first one draws; all ranks call it."""
        generators: list[Any] = [torch]
        if self.device_mesh.device_type == "cuda":
            generators.append(torch.cuda)
        states = [each.get_rng_state() for each in generators]
        dist.broadcast_object_list(states, src=0)
        for each, state in zip(generators, states, strict=True):
            each.set_rng_state(state)

    def before_backward(self, module: nn.Module, *, last: bool) -> None:
        """Say whether this is the last of several backward passes before the optimiser's step."""
        if isinstance(module, FSDPModule) and self.scheme.defer_fsdp_grad_sync:
            module.set_requires_gradient_sync(last)


class DDPManager:
    """Keeps a whole copy of a component on each rank, whose gradients are averaged.

    Attributes:
        scheme: what was asked for.
    """

    def __init__(self, scheme: DDP) -> None:
        self.scheme = scheme

    def parallelize(self, module: nn.Module) -> nn.Module:
        """Wrap a module with trainable parameters; what it has besides stays in reach.

        Raises:
            InputError: all of it is frozen.
        """
        check_trainable(module)
        if self.scheme.activation_checkpointing:
            checkpoint_activations(module)
        device = next(module.parameters()).device
        return Replica(module, device_ids=[device] if device.type == "cuda" else None)

    def share_noise(self) -> None:
        """Do nothing: a rank with a whole copy may run alone, with noise of its own."""


def check_trainable(module: nn.Module) -> None:
    """Refuse a module of which no parameter is trained.

    Raises:
        InputError: it is for ddp, which is for training.
    """
    if not any(each.requires_grad for each in module.parameters()):
        raise InputError(
            f"{type(module).__name__} is frozen, and ddp is for training: load_for_training=True. To run it "
            "spread over ranks, use {'_manager_type': 'fsdp2'}."
        )


class Replica(DistributedDataParallel):
    """A rank's copy of a component, which keeps its attributes: ``config``, ``dtype``, its blocks."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Name the component's modules as it does itself."""
        return self.module.named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        """Name the component's children as it does itself."""
        return self.module.named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the component's own weights, under its own names."""
        return self.module.state_dict(*args, **kwargs)


Manager = FSDP2Manager | DDPManager


def make_manager(component: str, scheme: Scheme, world: int, device: torch.device) -> Manager:
    """Return a component's manager."""
    if isinstance(scheme, FSDP2):
        return FSDP2Manager(component, scheme, world, device)
    assert isinstance(scheme, DDP)
    return DDPManager(scheme)


def shard_blocks(module: nn.Module, mesh: DeviceMesh, scheme: FSDP2) -> None:
    """Shard each repeated block by itself, and what is left with the whole.

    Only one block is whole at a time, so that a rank holds its share and one block more. Parameters of
    another dtype than most, which a class keeps in float32, stay whole on every rank.
    """
    sizes: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        sizes[parameter.dtype] += parameter.numel()
    usual = sizes.most_common(1)[0][0]
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {each for each in module.parameters() if each.dtype != usual},
        "mp_policy": scheme.mp_policy or MixedPrecisionPolicy(),
        "offload_policy": scheme.offloading,
    }
    for path in _CALLED_BESIDE.get(type(module).__name__, ()):
        fully_shard(module.get_submodule(path), reshard_after_forward=True, **options)
    for block in blocks(module):
        fully_shard(block, reshard_after_forward=True, **options)
    fully_shard(module, **options)
    for method in ("encode", "decode"):
        if callable(getattr(module, method, None)):
            register_fsdp_forward_method(module, method)


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return a model's repeated blocks: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [each for each in child if any(True for _ in each.parameters())]
        else:
            found += blocks(child)
    return found


def checkpoint_activations(module: nn.Module) -> None:
    """Have a model compute its activations again in training.

    Raises:
        InputError: its class cannot.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        enable = getattr(module, name, None)
        if callable(enable):
            try:
                enable()
            except ValueError:
                break  # its class says that it cannot
            return
    raise InputError(
        f"{type(module).__name__} cannot compute activations again: activation_checkpointing=False."
    )


def make_trainable(module: nn.Module) -> int:
    """Let every parameter be trained; returns how many numbers that are, over all ranks."""
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return sum(parameter.numel() for parameter in module.parameters())


def _split_layers(module: nn.Module, mesh: DeviceMesh, plan: dict[str, Any]) -> None:
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "sequence": SequenceParallel}
    paths = [path.split(".") for path, _ in module.named_modules()]
    for pattern, style in plan.items():
        parts = pattern.split(".")
        # Part by part, as torch does it, which only warns of a pattern that fits nothing.
        if not any(len(path) == len(parts) and all(map(fnmatch.fnmatch, path, parts)) for path in paths):
            raise UnknownNameError(f"tp_plan: no module of {type(module).__name__} is called {pattern!r}.")
        parallelize_module(module, mesh, {pattern: styles[style]() if isinstance(style, str) else style})
