"""The component tree as data, and the sites a patch map starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from workbench.models.model import DiffusionModel
from workbench.models.shapes import Shapes
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Node:
    """A row of the component tree.

    Attributes:
        path: the module's path, or the component's name.
        name: its last part.
        cls: the class's name.
        depth: 0 for components.
        parameters: how many it has, those inside included.
        dtype: of its first parameter, "" without parameters.
        device: likewise.
        shape: of what it returned in the last run, "" before one.
        kind: component, module, attention or other (a tokenizer, a scheduler).
    """

    path: str
    name: str
    cls: str
    depth: int
    parameters: int
    dtype: str
    device: str
    shape: str
    kind: str


def outline(model: DiffusionModel) -> list[Node]:
    """Return the component tree in preorder: every component, and every module inside."""
    nodes: list[Node] = []
    for name, component in model.components.items():
        if isinstance(component, nn.Module):
            shapes = model.shapes
            nodes += [
                _node(path, module, shapes.get(path, ""))
                for path, module in component.named_modules(prefix=name)
            ]
        else:
            nodes.append(Node(name, name, type(component).__name__, 0, 0, "", "", "", "other"))
    return nodes


def _node(path: str, module: nn.Module, shape: str) -> Node:
    first = next(module.parameters(), None)
    kind = "component" if "." not in path else "module"
    if hasattr(module, "processor") and hasattr(module, "to_q"):
        kind = "attention"
    return Node(
        path=path,
        name=path.rpartition(".")[2],
        cls=type(module).__name__,
        depth=path.count("."),
        parameters=sum(each.numel() for each in module.parameters()),
        dtype="" if first is None else str(first.dtype).removeprefix("torch."),
        device="" if first is None else str(first.device),
        shape=shape,
        kind=kind,
    )


def patch_sites(denoisers: Mapping[str, nn.Module], shapes: Shapes) -> list[Site]:
    """Return the sites of a patch map: each block's output and each spatial attention's, as they run.

    Args:
        denoisers: the model's denoisers.
        shapes: what each module returned in a run, in the order in which it did.

    Returns:
        One site for each tensor that a block returns at the top of its output: a joint transformer's
        block has two, its text and its image.
    """
    blocks = {path for name, module in denoisers.items() for path in _blocks(name, module)}
    sites = []
    for path, found in shapes.shapes.items():
        if path in blocks:
            top = [leaf for leaf, shape in found.items() if len(leaf) <= 1 and len(shape) >= 3]
            alone = len(found) == 1
            sites += [Site(path, "output", () if alone else leaf) for leaf in top]
    return sites


def _blocks(name: str, denoiser: nn.Module) -> list[str]:
    paths = []
    for child, module in denoiser.named_children():
        if isinstance(module, nn.ModuleList) and "block" in child:
            paths += [f"{name}.{child}.{index}" for index in range(len(module))]
        elif "block" in child:
            paths.append(f"{name}.{child}")
    inside = []
    for path in paths:
        block = denoiser.get_submodule(path.removeprefix(f"{name}."))
        attentions = getattr(block, "attentions", None)
        if isinstance(attentions, nn.ModuleList):
            inside += [f"{path}.attentions.{index}" for index in range(len(attentions))]
    return paths + inside
