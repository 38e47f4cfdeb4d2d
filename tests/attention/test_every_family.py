"""Maps of every family, under every kind of scheduler and guidance, against attention computed by hand."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

from tests import tiny
from tests.attention.seen import Kernel
from tests.watching import as_bytes
from workbench.attention.geometry import BLOCKS
from workbench.attention.request import Attention
from workbench.models.model import DiffusionModel

TOLERANCE = 1e-6
OWN, CFG = ("sd1", "sdxl", "sd3", "flux", "pixart", "wan"), ("flux-cfg", "wan22")
TEXT = {"sd3": (False, 48), "flux": (True, 24), "flux-cfg": (True, 24)}
CASES = [
    *((name, None) for name in (*OWN, *CFG)),
    *((name, PNDMScheduler) for name in ("sd1", "sdxl", "pixart")),
    *((name, HeunDiscreteScheduler) for name in ("sd1", "sdxl", "pixart")),
    *(
        (name, FlowMatchHeunDiscreteScheduler) for name in ("sd3", "wan")
    ),  # Flux itself takes no such scheduler
]


def built(name, scheduler):
    case = tiny.CASES[name]
    pipeline = case.build()
    if scheduler is not None:
        settings = dict(pipeline.scheduler.config)
        if scheduler is PNDMScheduler:
            settings |= {"skip_prk_steps": True}
        pipeline.scheduler = scheduler.from_config(settings)
    return pipeline, case.arguments


def eager(seen):
    """Return the softmax of one call, ``(rows, heads, queries, keys)``, in the plainest way there is."""
    logits = seen.query.float() @ seen.key.float().transpose(-1, -2) / seen.query.shape[-1] ** 0.5
    if seen.mask is not None:
        hidden = seen.mask if seen.mask.is_floating_point() else torch.where(seen.mask, 0.0, -torch.inf)
        logits = logits + hidden
    return logits.softmax(-1)


def pictures(output):
    return output.frames if "frames" in output.keys() else output.images  # noqa: SIM118


def stretches(name, seen):
    """Return where text and image lie among the keys of a call, and among its queries."""
    keys, queries = seen.key.shape[2], seen.query.shape[2]
    if name not in TEXT:
        own = keys == queries and "attn1" in seen.path
        return {"image": slice(0, queries)}, {"image" if own else "text": slice(0, keys)}
    first, length = TEXT[name]
    text = slice(0, length) if first else slice(keys - length, keys)
    image = slice(length, keys) if first else slice(0, keys - length)
    return ({"image": image, "text": text},) * 2


@pytest.mark.parametrize(("name", "scheduler"), CASES, ids=lambda each: getattr(each, "__name__", each))
def test_every_map_is_that_of_attention_by_hand(name, scheduler):
    pipeline, arguments = built(name, scheduler)
    bare = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(0))
    names = [each for each in ("unet", "transformer", "transformer_2") if getattr(pipeline, each, None)]
    blocks = BLOCKS if name in TEXT else ("image->text", "image->image")
    with ExitStack() as stack:
        kernels = {each: stack.enter_context(Kernel(pipeline, each)) for each in names}
        asked = [Attention(block=block, reduce=[]) for block in blocks]
        record = DiffusionModel(pipeline).record(**arguments, seed=0, capture=asked)
    assert as_bytes(pictures(record.output)) == as_bytes(pictures(bare))
    sums = {}
    for maps in record.attention:
        assert maps.layers
        asking, looked_at = maps.block.split("->")
        for path, kept in maps.layers.items():
            calls = kernels[path.partition(".")[0]].of(path)
            component = [row for row in record.ledger if row.component == path.partition(".")[0]]
            rows = [(index, row) for index, row in enumerate(component) if row.has("cond")]
            assert len(calls) == len(component)
            assert len(kept) == len(rows)
            for value, (index, row) in zip(kept, rows, strict=True):
                seen = calls[index]
                part = len(seen.query) // len(row.branches) * row.branches.index("cond")
                queries, keys = stretches(name, seen)
                expected = eager(seen)[part][:, queries[asking], keys[looked_at]]
                found = value.transpose(-1, -2) if maps.block == "image->text" else value
                assert found.shape == expected.shape
                assert (found - expected).abs().max() <= TOLERANCE
                key = (path, asking, row.call)
                sums[key] = sums.get(key, 0) + found.sum(-1)
    for whole in sums.values():
        assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)
