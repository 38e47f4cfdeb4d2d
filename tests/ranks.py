"""What each rank of a process group does in the tests of parallel schemes: one of these functions.

``torchrun --standalone --nproc-per-node 2 -m tests.ranks FUNCTION FOLDER`` calls it with the folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tests import tiny
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.models.parallel.managers import blocks, register_strategy

FAMILIES = ("flux", "wan", "sd1")
STEPS = 3


def traced(name: str, model: DiffusionModel) -> dict[str, torch.Tensor]:
    """Run a family's case: captured, patched and forked."""
    case = tiny.CASES[name]
    settings = {**case.arguments, "num_inference_steps": STEPS, "output_type": "latent"}
    source = model.record(seed=0, capture=[case.site], **settings)
    target = model.record(seed=1, **settings)
    patch = Patch(case.site, source=source, steps=(1, 2))
    patched = model.record(seed=1, interventions=[patch], **settings)
    with model.generate(seed=1, **settings) as run:
        for _ in run.steps[:1]:
            seen = model.site(case.site).output
            first = (seen[0] if isinstance(seen, tuple) else seen).clone()
    return {
        "latents": source.latents,
        "captured": source.passages(case.site)[-1].value,
        "patched": patched.latents,
        "forked": target.fork(1, interventions=[patch]).latents,
        "block": first,
    }


def laid_out(model: DiffusionModel) -> DiffusionModel:
    """Give weights memory of their own: in a file they lie anyhow, and sums differ by it in the last bit."""
    for part in model.components.values():
        for parameter in part.parameters() if isinstance(part, nn.Module) else ():
            parameter.data = parameter.data.clone()
    return model


def families(folder: Path) -> None:
    """Trace each family, its denoiser sharded."""
    for name in FAMILIES:
        denoiser = "unet" if name == "sd1" else "transformer"
        model = DiffusionModel.from_pretrained(folder / name, parallel_scheme={denoiser: {"backend": "gloo"}})
        assert list(model.managers) == [denoiser]
        part = model.components[denoiser]
        assert [path for path, each in part.named_parameters() if not isinstance(each, DTensor)] == []
        _keep(folder, f"{name}", traced(name, model))


def copies(folder: Path) -> None:
    """Trace under ddp, and under tensor parallelism; train a step of each."""
    scheme = {"transformer": {"_manager_type": "ddp"}}
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme=scheme, load_for_training=True)
    found = traced("flux", laid_out(model))
    plan = {
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
    }
    split = DiffusionModel.from_pretrained(
        folder / "flux", parallel_scheme={"transformer": {"tp_size": 2, "tp_plan": plan}}
    )
    weight = split.components["transformer"].transformer_blocks[0].ff.net[0].proj.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    own: list[str] = []

    def as_one(module: nn.Module, mesh: Any, _: Any) -> None:
        own.append(type(module).__name__)
        fully_shard(module, mesh=mesh)

    register_strategy("FluxTransformer2DModel", as_one)
    whole = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})
    assert own == ["FluxTransformer2DModel"]
    assert not any(isinstance(each, FSDPModule) for each in blocks(whole.components["transformer"]))
    _keep(folder, "copies", {"ddp": found["patched"], "tp": traced("flux", split)["patched"]})


def memory(folder: Path) -> None:
    """Say the most that a rank had of a denoiser's parameters: while it was loaded, and while it ran."""
    before = _anonymous()
    with _Watch() as watch:
        model = DiffusionModel.from_pretrained(folder / "dit", parallel_scheme={"transformer": {}})
    part = model.components["transformer"]
    whole = sum(each.numel() * each.element_size() for each in part.parameters())
    seen = [0]

    def look(*_: Any) -> None:
        seen.append(sum(_held(each) for each in part.parameters()))

    for block in blocks(part):
        block.register_forward_pre_hook(look)
        block.register_forward_hook(look)
    model.record(class_labels=[3], num_inference_steps=1, seed=0)
    _keep(folder, "memory", {"whole": whole, "running": max(seen), "loading": watch.most - before})


def failing(folder: Path) -> None:
    """Run, and fail on one rank in the second step."""
    _until_second_step(folder, lambda: (_ for _ in ()).throw(RuntimeError("this rank fails")))


def killed(folder: Path) -> None:
    """Run, and be killed on one rank in the second step."""
    _until_second_step(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _until_second_step(folder: Path, end: Any) -> None:
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})

    class Listening:
        def started(self, row: Any) -> None:
            if row.step == 1 and dist.get_rank() == 1:
                (folder / "failed").write_text(str(time.time()))
                end()

        def ticked(self, *_: Any) -> None: ...

    case = tiny.CASES["flux"]
    model.record(seed=0, listener=Listening(), **{**case.arguments, "num_inference_steps": 2000})


class _Watch:
    """The most anonymous memory this process had while the block ran, in bytes."""

    def __enter__(self) -> _Watch:
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _held(parameter: nn.Parameter) -> int:
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return here.numel() * here.element_size()


def _keep(folder: Path, name: str, found: dict[str, Any]) -> None:
    torch.save(found, folder / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
    dist.destroy_process_group()
