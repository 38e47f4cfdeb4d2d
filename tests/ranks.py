"""What each rank of a process group does in the tests of parallel schemes: one of these functions.

``torchrun --standalone --nproc-per-node 2 -m tests.ranks FUNCTION FOLDER`` calls it with the folder.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInputOutput, RowwiseParallel

from tests import tiny
from workbench.attention.request import Attention
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.models.outline import patch_sites
from workbench.models.parallel import opening  # noqa: F401  what it imports is no part of the model
from workbench.models.parallel.managers import blocks, register_strategy
from workbench.models.shapes import Shapes

FEED_FORWARD = {
    "transformer_blocks.*.ff.net.0.proj": "colwise",
    "transformer_blocks.*.ff.net.2": "rowwise",
}
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


def alone(folder: Path) -> None:
    """Trace each family in this process alone, and what was trained in copies, if it is there."""
    for name in (*FAMILIES, "trained"):
        if (folder / name).exists():
            family = "flux" if name == "trained" else name
            model = laid_out(DiffusionModel(folder / name, dispatch=True))
            torch.save(traced(family, model), folder / f"{name}-alone.pt")


def families(folder: Path) -> None:
    """Trace each family, its denoiser and a text encoder sharded."""
    for name in FAMILIES:
        denoiser = "unet" if name == "sd1" else "transformer"
        parts = [denoiser, "text_encoder_2" if name == "flux" else "text_encoder"]
        scheme = {part: {"backend": "gloo"} for part in parts}
        model = DiffusionModel.from_pretrained(folder / name, parallel_scheme=scheme)
        assert list(model.managers) == parts
        for part in parts:
            weights = model.components[part].named_parameters()
            assert [path for path, each in weights if not isinstance(each, DTensor)] == []
        _keep(folder, f"{name}", traced(name, model))


def copies(folder: Path) -> None:
    """Trace under ddp, under tensor parallelism, and sharded in a way of one's own."""
    scheme = {"transformer": {"_manager_type": "ddp"}}
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme=scheme, load_for_training=True)
    found: dict[str, Any] = {"ddp": traced("flux", laid_out(model))["patched"]}
    maps = model.record(seed=0, capture=[Attention()], **tiny.CASES["flux"].arguments).attention
    model.save_pretrained(folder / "trained")
    split = DiffusionModel.from_pretrained(
        folder / "flux", parallel_scheme={"transformer": {"tp_size": 2, "tp_plan": FEED_FORWARD}}
    )
    weight = split.components["transformer"].transformer_blocks[0].ff.net[0].proj.weight
    assert weight.to_local().shape[0] * 2 == weight.shape[0]
    found |= {
        "tp": traced("flux", split)["patched"],
        "sequence": traced("sd1", by_sequence(folder))["patched"],
    }
    mixed = DiffusionModel.from_pretrained(
        folder / "flux",
        parallel_scheme={"transformer": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}},
    )
    found["mixed"] = traced("flux", mixed)
    kept = DiffusionModel.from_pretrained(
        folder / "flux", parallel_scheme={"transformer": {"offload_policy": True}}
    )
    found["offloaded"] = traced("flux", kept)["patched"]
    own: list[str] = []

    def as_one(module: nn.Module, mesh: Any, _: Any) -> None:
        own.append(type(module).__name__)
        fully_shard(module, mesh=mesh)

    register_strategy("FluxTransformer2DModel", as_one)
    whole = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})
    assert own == ["FluxTransformer2DModel"]
    assert not any(isinstance(each, FSDPModule) for each in blocks(whole.components["transformer"]))
    _keep(
        folder,
        "copies",
        {
            **found,
            "layers": list(maps.layers),
            "sites": [str(site) for site in patch_sites(model.denoisers, _shapes(model))],
        },
    )


def by_sequence(folder: Path) -> DiffusionModel:
    """Return Stable Diffusion whose middle block works on a part of the sequence on each rank."""
    block, part, whole = "mid_block.attentions.*.transformer_blocks.*", Shard(1), Replicate()
    gathered = ColwiseParallel(input_layouts=part, output_layouts=whole)
    scattered = RowwiseParallel(input_layouts=whole, output_layouts=part)
    plan: dict[str, Any] = {
        block: PrepareModuleInputOutput(
            input_layouts=(whole,),
            desired_input_layouts=(part,),
            use_local_input=True,
            output_layouts=part,
            desired_output_layouts=whole,
        ),
        **dict.fromkeys((f"{block}.norm1", f"{block}.norm2", f"{block}.norm3"), "sequence"),
        **dict.fromkeys((f"{block}.attn1.to_{name}" for name in "qkv"), gathered),
        f"{block}.attn2.to_q": gathered,
        f"{block}.ff.net.0.proj": gathered,
        **dict.fromkeys((f"{block}.attn1.to_out.0", f"{block}.attn2.to_out.0"), scattered),
        f"{block}.ff.net.2": scattered,
    }
    scheme = {"tp_size": 2, "sequence_parallel": True, "tp_plan": plan}
    return DiffusionModel.from_pretrained(folder / "sd1", parallel_scheme={"unet": scheme})


def meshes(folder: Path) -> None:
    """Trace with shards of layers that are split, on four ranks."""
    scheme = {"dp_size": 2, "tp_size": 2, "tp_plan": FEED_FORWARD}
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": scheme})
    weight = model.components["transformer"].transformer_blocks[0].ff.net[0].proj.weight
    assert weight.to_local().numel() * 4 == weight.numel()
    spec = {"transformer_cls": "FluxTransformer2DModel", "load_full_pipeline": True}
    built = DiffusionModel.from_config(
        folder / "flux", spec, seed=3, parallel_scheme={"transformer": scheme, "text_encoder_2": {}}
    )
    assert all(isinstance(each, DTensor) for each in built.components["text_encoder_2"].parameters())
    drawn = built.components["transformer"]
    weights = {path: each.full_tensor() for path, each in drawn.named_parameters()}
    _keep(
        folder,
        "meshes",
        {**traced("flux", model), "drawn": weights, "built": traced("flux", built)["latents"]},
    )


def _shapes(model: DiffusionModel) -> Shapes:
    shapes = Shapes()
    model.record(seed=0, capture=[shapes], **tiny.CASES["flux"].arguments)
    return shapes


def training(folder: Path) -> None:
    """Make two backward passes of each kind, and gather the gradients."""
    found = {}
    for name, kind in (("fsdp2", "fsdp2"), ("ddp", "ddp"), ("at once", "fsdp2")):
        scheme = {"unet": {"_manager_type": kind, "activation_checkpointing": name == "fsdp2"}}
        if name == "at once":
            scheme["unet"]["defer_fsdp_grad_sync"] = False
        model = DiffusionModel.from_pretrained(folder / "sd1", parallel_scheme=scheme, load_for_training=True)
        unet, manager = model.components["unet"].train(), model.managers["unet"]
        exchanged = []
        for step in (0, 1):
            if kind == "fsdp2":
                manager.before_backward(unet, last=step == 1)
            backward(unet, step, dist.get_rank())
            # Not before the last pass are gradients in shards, unless they are exchanged in each.
            exchanged.append(any(isinstance(each.grad, DTensor) for each in unet.parameters()))
        assert exchanged == {"fsdp2": [False, True], "ddp": [False, False], "at once": [True, True]}[name]
        found[name] = {
            path.removeprefix("module."): (each.grad.full_tensor() if kind == "fsdp2" else each.grad).clone()
            for path, each in unet.named_parameters()
            if each.grad is not None
        }
    _keep(folder, "training", found)


def backward(unet: nn.Module, step: int, rank: int) -> None:
    """Take the derivative of a loss on inputs of a step's and a rank's own."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    sample = torch.randn((1, 4, 8, 8), generator=generator)
    words = torch.randn((1, 5, unet.config.cross_attention_dim), generator=generator)
    unet(sample, torch.tensor([500]), encoder_hidden_states=words).sample.square().mean().backward()


def bfloat(folder: Path) -> None:
    """Say in which dtypes a sharded model has its parameters and buffers, and what it computes."""
    model = DiffusionModel.from_pretrained(
        folder / "wan", parallel_scheme={"transformer": {}, "text_encoder": {}, "vae": {}}, dtype="bfloat16"
    )
    part = model.components["transformer"]
    case = tiny.CASES["wan"]
    run = model.record(seed=0, **{**case.arguments, "num_inference_steps": STEPS, "output_type": "latent"})
    film = model.record(seed=0, **{**case.arguments, "num_inference_steps": 1})
    assert film.frames is not None
    _keep(folder, "bfloat", {"dtypes": dtypes(part), "latents": run.latents})


def dtypes(part: nn.Module) -> dict[str, str]:
    """Return the dtype of each parameter and buffer."""
    return {path: str(each.dtype) for path, each in (*part.named_parameters(), *part.named_buffers())}


def memory(folder: Path) -> None:
    """Say the most that a rank had of a denoiser's parameters: while it was loaded, ran, and was drawn."""
    scheme, spec = {"transformer": {}}, {"transformer_cls": "DiTTransformer2DModel"}
    with _Watch() as loading:
        model = DiffusionModel.from_pretrained(folder / "dit", parallel_scheme=scheme)
    part = model.components["transformer"]
    whole = sum(each.numel() * each.element_size() for each in part.parameters())
    seen = [0]

    def look(*_: Any) -> None:
        seen.append(sum(_held(each) for each in part.parameters()))

    for block in blocks(part):
        block.register_forward_pre_hook(look)
        block.register_forward_hook(look)
    model.record(class_labels=[3], num_inference_steps=1, seed=0)
    with _Watch() as drawing:
        drawn = DiffusionModel.from_config(folder / "dit", spec, seed=3, parallel_scheme=scheme)
    weights = {path: each.full_tensor() for path, each in drawn.components["transformer"].named_parameters()}
    torch.save(weights, folder / f"drawn-{dist.get_rank()}.pt")
    most = {"running": max(seen), "loading": loading.most, "drawing": drawing.most}
    _keep(folder, "memory", {"whole": whole, **most})


def failing(folder: Path) -> None:
    """Run, and fail on one rank in the second step."""
    _until_second_step(folder, lambda: (_ for _ in ()).throw(RuntimeError("this rank fails")))


def killed(folder: Path) -> None:
    """Run, and be killed on one rank in the second step."""
    _until_second_step(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _until_second_step(folder: Path, end: Any) -> None:
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})
    _run_until(model, folder, end, [1])


def _run_until(model: DiffusionModel, folder: Path, end: Any, ranks: list[int]) -> None:
    class Listening:
        def started(self, row: Any) -> None:
            if row.step == 1 and dist.get_rank() in ranks:
                (folder / "failed").write_text(str(time.time()))
                end()

        def ticked(self, *_: Any) -> None: ...

    case = tiny.CASES["flux"]
    model.record(seed=0, listener=Listening(), **{**case.arguments, "num_inference_steps": 2000})


def parting(folder: Path) -> None:
    """Draw noise of no seed; fail alike and go on; then fail on one rank, which lives on."""
    rank = int(os.environ["RANK"])
    model = DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})
    settings = {**tiny.CASES["flux"].arguments, "num_inference_steps": STEPS, "output_type": "latent"}

    def fail() -> None:
        raise ArithmeticError("this rank fails")

    for _ in range(2):
        with suppress(ArithmeticError):
            _run_until(model, folder, fail, [0, 1])
    torch.manual_seed(rank)
    found: dict[str, Any] = {"noise": model.record(**settings).latents, "errors": []}
    for _ in range(2):
        try:
            with model.generate(seed=0, **{**settings, "num_inference_steps": 2000}) as run:
                for _ in run.steps[:2]:
                    pass
                if rank == 1:
                    (folder / "failed").write_text(str(time.time()))
                    fail()
        except Exception as error:  # noqa: BLE001 - this is a script that goes on
            found["errors"].append(f"{type(error).__name__}: {error}")
            found.setdefault("seconds", time.time() - float((folder / "failed").read_text()))
    _keep(folder, "parting", found)


class _Watch:
    """The most anonymous memory this process took while the block ran, in bytes."""

    def __enter__(self) -> _Watch:
        ctypes.CDLL(None).malloc_trim(0)
        self._before, self.most, self._done = _anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.most = max(self.most, _anonymous() - self._before)


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
    if dist.is_initialized():
        dist.destroy_process_group()
