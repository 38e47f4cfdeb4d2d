"""A pipeline made of blocks, which is no ``DiffusionPipeline``."""

from __future__ import annotations

from typing import Any

from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

from tests.tiny.parts import seeded
from tests.tiny.unets import sdxl_parts


@seeded
def modular_sdxl() -> Any:
    """SDXL as blocks: a guider makes one call for each branch, and the result is the state of the blocks."""
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    pipeline.update_components(**sdxl_parts())
    _hush(pipeline._blocks)
    return pipeline


def _hush(block: Any) -> None:
    """Switch the bars of all blocks off; the pipeline's own switch reaches the outermost only."""
    block._progress_bar_config = {"disable": True}
    for inner in getattr(block, "sub_blocks", {}).values():
        _hush(inner)
