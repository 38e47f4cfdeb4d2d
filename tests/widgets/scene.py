"""A small made-up run, for looking at the widgets without a model."""

from __future__ import annotations

import functools
import io
import math

import numpy as np
from PIL import Image

from workbench.widgets.code import CodeView
from workbench.widgets.controls import RunControls
from workbench.widgets.element import Element
from workbench.widgets.images import ImageStrip
from workbench.widgets.patch_map import PatchMap
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.tree import ComponentTree

STEPS = 20
SIZE = 64
WORDS = ["<start>", "a", "red", "circle", "left", "of", "a", "blue", "square", "<end>"]
HOSTILE = '"""</script><img src=x onerror=alert(1)>\u2028 {{saved}} <!--'
BLOCKS = [
    "down_blocks.0",
    "down_blocks.1",
    "down_blocks.2",
    "mid_block",
    "up_blocks.0",
    "up_blocks.1",
    "up_blocks.2",
]

CODE = '''"""A blue circle, with one block's activation from a red one."""

import torch
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("shapes-unet")
source = pipe("a red circle", num_inference_steps=20, generator=torch.Generator("cpu").manual_seed(0))


@torch.no_grad()
def patched(prompt: str, seed: int = 0) -> list:
    """Runs the target with the patch in."""
    for step in range(0, 8):  # the steps covered
        value = 0.5 * step + 1e-3
    return [prompt, seed, value]


patched("a blue circle").save("patched.png")
'''


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def picture(colour: tuple[int, int, int], clear: float, seed: int) -> np.ndarray:
    """A disc and a square that come out of noise as ``clear`` goes from 0 to 1."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    image = np.full((SIZE, SIZE, 3), 236.0)
    image[(x - 20) ** 2 + (y - 36) ** 2 < 144] = colour
    image[(abs(x - 46) < 9) & (abs(y - 22) < 9)] = (58, 92, 200)
    noise = np.random.default_rng(seed).normal(128, 70, image.shape)
    return np.clip(clear * image + (1 - clear) * noise, 0, 255).astype(np.uint8)


@functools.cache
def lane(label: str, colour: tuple[int, int, int], seed: int) -> dict:
    clear = [1 / (1 + math.exp(-(step - 6) / 1.8)) for step in range(STEPS)]
    guess = [png(picture(colour, 0.35 + 0.65 * part, seed)) for part in clear]
    latents = [png(picture(colour, part, seed)[::4, ::4]) for part in clear]
    noise = [
        png(picture(colour, 0.15 * (1 - part), seed + step)[::4, ::4]) for step, part in enumerate(clear)
    ]
    frames = {"predicted x₀": guess, "latents": latents, "noise": noise}
    return {"label": label, "frames": frames, "final": png(picture(colour, 1.0, seed))}


@functools.cache
def attention() -> dict:
    layers, h, w = ["all layers", "down_blocks.1.attentions.0", "mid_block.attentions.0"], 16, 16
    y, x = np.mgrid[0:h, 0:w]
    rng = np.random.default_rng(0)
    data = np.zeros((len(layers), STEPS, len(WORDS), h, w))
    for index in range(len(WORDS)):
        centre = {2: (9, 5), 3: (9, 5), 7: (5, 11), 8: (5, 11)}.get(index, tuple(rng.integers(2, 14, 2)))
        for step in range(STEPS):
            width = 3.0 + 10.0 * (1 - step / STEPS)
            blob = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width))
            data[:, step, index] = blob + 0.08 * rng.random((len(layers), h, w))
    scales = data.max(axis=(1, 3, 4))
    quantised = np.rint(255 * data / scales[:, None, :, None, None]).astype(np.uint8)
    tokens = [{"text": word, "index": i, "special": word.startswith("<")} for i, word in enumerate(WORDS)]
    return {
        "lane": 0, "layers": layers, "tokens": tokens, "shape": list(data.shape),
        "scales": (0.11 * scales).tolist(), "data": quantised.tobytes(),
    }  # fmt: skip


def node(path: str, cls: str, parameters: int, kind: str = "module", shape: str = "") -> dict:
    name = path.rsplit(".", 1)[-1]
    return {
        "path": path, "name": name, "cls": cls, "depth": path.count("."), "parameters": parameters,
        "dtype": "float32", "device": "cpu", "shape": shape, "kind": kind,
    }  # fmt: skip


def nodes() -> list[dict]:
    made = [
        node("text_encoder", "CLIPTextModel", 412_672, "component"),
        node("text_encoder.encoder", "CLIPEncoder", 334_944),
    ]
    for layer in range(3):
        made.append(node(f"text_encoder.encoder.{layer}", "CLIPEncoderLayer", 111_648))
        made.append(node(f"text_encoder.encoder.{layer}.self_attn", "CLIPAttention", 37_248, "attention"))
    made.append(node("unet", "UNet2DConditionModel", 5_234_112, "component"))
    made.append(node("unet.conv_in", "Conv2d", 1_776, shape="(2, 48, 16, 16)"))
    for group, count in [("down_blocks", 3), ("up_blocks", 3)]:
        made.append(node(f"unet.{group}", "ModuleList", 2_100_000))
        for block in range(count):
            path = f"unet.{group}.{block}"
            made.append(node(path, "CrossAttnDownBlock2D", 700_000, shape="(2, 96, 8, 8)"))
            made.append(node(f"{path}.attentions", "ModuleList", 310_000))
            for part in range(2):
                made.append(
                    node(f"{path}.attentions.{part}", "Transformer2DModel", 155_000, shape="(2, 96, 8, 8)")
                )
                made.append(
                    node(f"{path}.attentions.{part}.attn2", "Attention", 37_056, "attention", "(2, 64, 96)")
                )
    made.append(node("unet.mid_block", "UNetMidBlock2DCrossAttn", 990_000, shape="(2, 128, 4, 4)"))
    made.append(node("unet.mid_block.attentions", "ModuleList", 210_000))
    made.append(node("unet.mid_block.attentions.0", "Transformer2DModel", 210_000, shape="(2, 128, 4, 4)"))
    made.append(node("vae", "AutoencoderKL", 923_880, "component"))
    made.append(node("vae.decoder", "Decoder", 500_000))
    made.append(node("scheduler", "DDIMScheduler", 0, "other"))
    return made


def tree() -> ComponentTree:
    return ComponentTree(nodes=nodes(), selected="unet.mid_block", marked=["unet.mid_block"])


def controls(**more: object) -> RunControls:
    known = {
        "model_name": "shapes-unet", "scheduler": "DDIM", "source": "a red circle left of a blue square",
        "target": "a green cross left of a blue square", "preview": png(picture((200, 60, 50), 0.8, 1)),
    }  # fmt: skip
    return RunControls(**{**known, **more})


def scrubber(**more: object) -> StepScrubber:
    sigmas = [14.6 * (1 - step / STEPS) ** 2 for step in range(STEPS)]
    lanes = [
        lane("source", (200, 60, 50), 1),
        lane("target", (50, 160, 80), 2),
        lane("patched", (190, 80, 60), 2),
    ]
    known = {
        "lanes": lanes,
        "kinds": ["predicted x₀", "latents", "noise"], "kind": "predicted x₀", "step": 7,
        "rows": [{"step": s, "timestep": 950 - 50 * s, "sigma": sigmas[s]} for s in range(STEPS)],
        "curve": [2.0 + 6 * math.exp(-(((s - 6) / 3) ** 2)) for s in range(STEPS)],
        "attention": attention(),
    }  # fmt: skip
    return StepScrubber(**{**known, **more})


def effects(*, holes: bool = True, signed: bool = False) -> np.ndarray:
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[0 : len(BLOCKS), 0:STEPS]
    values = 0.8 * np.exp(-((rows - 3) ** 2) / 3 - (columns - 5) ** 2 / 30) + 0.05 * rng.random(rows.shape)
    if signed:
        values = values - 0.9 * np.exp(-((rows - 5) ** 2) / 2 - (columns - 14) ** 2 / 20)
    if holes:
        values[rng.random(values.shape) < 0.4] = np.nan
    return values.astype(np.float32)


def patch_map(*, holes: bool = True, **more: object) -> PatchMap:
    known = {
        "sites": [f"unet.{block}" for block in BLOCKS], "steps": STEPS, "metric": "image difference",
        "noise_floor": 0.118, "selected": [3, 5],
        "source_label": "a red circle", "target_label": "a blue circle",
    }  # fmt: skip
    made = PatchMap(**{**known, **more})
    made.show(effects(holes=holes, signed=made.signed))
    return made


def images() -> ImageStrip:
    source, target, patched = (png(picture(c, 1.0, 1)) for c in [(200, 60, 50), (50, 160, 80), (190, 80, 60)])
    difference = png(
        np.abs(picture((50, 160, 80), 1, 1).astype(int) - picture((190, 80, 60), 1, 1)).astype(np.uint8)
    )
    cards = [
        {"label": "source", "png": source, "caption": "circle red · square blue", "badge": ""},
        {"label": "target", "png": target, "caption": "circle green · square blue", "badge": ""},
        {"label": "patched", "png": patched, "caption": "circle red · square blue", "badge": ""},
        {"label": "difference", "png": difference, "caption": "patched − target", "badge": "×4"},
    ]
    return ImageStrip(cards=cards, note="difference 0.031 · noise floor 0.118")


def code() -> CodeView:
    return CodeView(
        code=CODE, filename="experiment.py", formats=["diffusers script", "workbench script", "JSON"]
    )


def app() -> list[Element | list[Element]]:
    return [controls(), [tree(), scrubber(), images()], [patch_map(), code()]]
