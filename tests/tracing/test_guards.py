import pytest

from tests import tiny
from workbench.errors import GuardError
from workbench.models.model import DiffusionModel
from workbench.tracing.guards import check
from workbench.tracing.sites import Site, resolve


@pytest.fixture
def compiled():
    """A model with one block marked as compiled; nothing compiles before it is called."""
    pipeline = tiny.sd1()
    pipeline.unet.mid_block.compile(backend="eager")
    return DiffusionModel(pipeline)


@pytest.fixture
def cached():
    """A model that says its blocks are cached, as `enable_cache` would make it."""
    from diffusers import FirstBlockCacheConfig

    pipeline = tiny.flux()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return DiffusionModel(pipeline)


FLUX = tiny.CASES["flux"].arguments


def test_a_site_inside_a_compiled_component_is_refused(compiled):
    with pytest.raises(GuardError, match=r"unet is compiled.*unet\.mid_block"):
        compiled.record("a red circle", num_inference_steps=1, capture=["unet.mid_block"])


def test_reading_inside_a_compiled_component_is_refused(compiled):
    with pytest.raises(GuardError, match="unet is compiled"), compiled.trace("a red circle"):
        compiled.unet.mid_block.output.clone()


def test_a_site_outside_the_compiled_component_is_taken(compiled):
    for path in ("text_encoder.embeddings", "vae.decoder", "unet"):
        check(compiled.components, {Site(path): resolve(compiled.components, path)})


def test_a_component_with_a_block_cache_is_refused_until_it_is_switched_off(cached):
    site = "transformer.transformer_blocks.0.ff"
    with pytest.raises(GuardError, match=r"transformer\.disable_cache"):
        cached.record(**FLUX, capture=[site])
    with pytest.raises(GuardError, match="cache"), cached.trace(**FLUX):
        cached.site(site).output.clone()
    cached.pipeline.transformer.disable_cache()
    assert len(cached.record(**FLUX, capture=[site])[site]) == 4
