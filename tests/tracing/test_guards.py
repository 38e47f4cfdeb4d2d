"""Each setting in the table of `guards` does what it says: it works, or it is refused before the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tests import tiny
from tests.watching import as_bytes, footprint, forwards_of
from workbench.attention.request import Attention
from workbench.errors import GuardError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing import guards
from workbench.tracing.guards import check
from workbench.tracing.sites import Site

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

COLUMNS = ("sites", "maps", "forks")
CPU = torch.device("cpu")
KERNEL = functional.scaled_dot_product_attention
WORDS = 24
"""Tokens of every prompt here."""


def table():
    """Read the table of the module's docstring: what each setting does to sites, maps and forks."""
    rows = [line.strip("| ").split(" | ") for line in guards.__doc__.splitlines() if line.startswith("| ")]
    return {setting: dict(zip(COLUMNS, outcomes[:3], strict=True)) for setting, *outcomes in rows[1:]}


TABLE = table()


def modular():
    """Stable Diffusion XL as a modular pipeline: guidance in two calls, by a component of its own."""
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    parts = tiny.sdxl().components
    pipeline = StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
    pipeline.update_components(**{name: parts[name] for name in names})
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        parts[name].eval()
    return pipeline


def nothing(pipeline):
    """Leave the pipeline as it is."""


@dataclass(frozen=True)
class Setting:
    """A setting of a pipeline.

    Attributes:
        apply: sets it.
        undo: what the message says to do; only where something is refused.
        says: what the message must name.
        family: the tiny pipeline.
    """

    apply: Callable[[Any], Any] = nothing
    undo: Callable[[Any], Any] = nothing
    says: str = ""
    family: str = "sd1"

    @property
    def build(self):
        return modular if self.family == "modular" else tiny.CASES[self.family].build

    @property
    def arguments(self):
        size = {} if self.family == "sd1" else tiny.SQUARE
        length = {"max_sequence_length": WORDS} if self.family == "flux" else {}
        kind = {"output": "images"} if self.family == "modular" else {}
        return {"prompt": "a red circle", "num_inference_steps": 3, **size, **length, **kind}

    @property
    def denoiser(self):
        return "transformer" if self.family == "flux" else "unet"

    @property
    def site(self):
        return "transformer.transformer_blocks.0.attn" if self.family == "flux" else "unet.mid_block"


def slice_attention(pipeline):
    pipeline.enable_attention_slicing(1)


def compile_denoiser(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")


def uncompile_denoiser(pipeline):
    pipeline.transformer = pipeline.transformer._orig_mod


def compile_in_place(pipeline):
    pipeline.transformer.compile(backend="eager")


def compile_blocks(pipeline):
    pipeline.transformer.compile_repeated_blocks(backend="eager")


def run_eagerly(pipeline):
    torch.compiler.set_stance("force_eager")


def offload_sequentially(pipeline):
    # What pipeline.enable_sequential_cpu_offload does to each part, with the CPU as the accelerator.
    accelerate.cpu_offload(pipeline.unet, CPU)


def offload_in_groups(pipeline):
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def cast_layerwise(pipeline):
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantise(pipeline):
    from torch.ao.quantization import quantize_dynamic

    pipeline.transformer = quantize_dynamic(pipeline.transformer, {torch.nn.Linear}, dtype=torch.qint8)


def adapt(pipeline):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        pipeline.unet.add_adapter(config)


def caching(make):
    def enable(pipeline):
        pipeline.transformer.enable_cache(make(pipeline))

    def disable(pipeline):
        pipeline.transformer.disable_cache()

    return Setting(enable, disable, r"transformer\.disable_cache\(\)", "flux")


def with_backend(name, says=""):
    def switch(pipeline):
        pipeline.transformer.set_attention_backend(name)

    def switch_back(pipeline):
        pipeline.transformer.set_attention_backend("native")

    return Setting(switch, switch_back, says, "flux")


def first_block(pipeline):
    return FirstBlockCacheConfig(threshold=0.9)


def after_the_first_step(pipeline):
    return {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 990),
        "current_timestep_callback": lambda: pipeline.current_timestep,
    }


def broadcast(pipeline):
    return PyramidAttentionBroadcastConfig(**after_the_first_step(pipeline))


def faster(pipeline):
    return FasterCacheConfig(is_guidance_distilled=True, **after_the_first_step(pipeline))


STANCE = r"set_stance\('force_eager'\)"

SETTINGS = {
    "nothing set": Setting(),
    "attention slicing": Setting(
        slice_attention, lambda pipeline: pipeline.disable_attention_slicing(), "disable_attention_slicing"
    ),
    "other attention processor": Setting(
        lambda pipeline: pipeline.unet.set_attn_processor(AttnProcessor()),
        lambda pipeline: pipeline.unet.set_attn_processor(AttnProcessor2_0()),
        r"in AttnProcessor, .*unet\.set_attn_processor\(AttnProcessor2_0\(\)\)",
    ),
    "native attention backend": with_backend("_native_math"),
    "other attention backend": with_backend(
        "flex", r"'flex'.*transformer\.set_attention_backend\('native'\)"
    ),
    "fused projections": Setting(lambda pipeline: pipeline.fuse_qkv_projections()),
    "torch.compile": Setting(
        compile_denoiser, uncompile_denoiser, f"transformer is compiled.*{STANCE}", "flux"
    ),
    "compiled in place": Setting(compile_in_place, run_eagerly, f"transformer .*compiled.*{STANCE}", "flux"),
    "compiled blocks": Setting(
        compile_blocks, run_eagerly, rf"transformer\.transformer_blocks\.0 is compiled.*{STANCE}", "flux"
    ),
    "FirstBlockCache": caching(first_block),
    "PyramidAttentionBroadcast": caching(broadcast),
    "FasterCache": caching(faster),
    "model CPU offload": Setting(lambda pipeline: pipeline.enable_model_cpu_offload(device="cpu")),
    "sequential CPU offload": Setting(offload_sequentially),
    "group offload": Setting(offload_in_groups),
    "layerwise casting": Setting(cast_layerwise),
    "quantised weights": Setting(quantise, family="flux"),
    "LoRA": Setting(adapt),
    "modular pipeline": Setting(family="modular"),
}


def outcomes(column, outcome):
    names = [name for name in TABLE if TABLE[name][column] == outcome]
    return pytest.mark.parametrize("setting", [SETTINGS.get(name) for name in names], ids=names)


@pytest.fixture(autouse=True)
def _switches(request):
    """Give torch and diffusers back what settings change for the whole process."""
    backend = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(backend)
    if "compile" in request.node.name:
        torch.compiler.set_stance("default")
        torch.compiler.reset()


def bare_run(pipeline, setting, **more):
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        output = pipeline(**setting.arguments, **more, generator=generator)
    return as_bytes(output if setting.family == "modular" else output.images)


def hooked_run(pipeline, setting, path):
    """Run with a plain torch hook on one module; return what it saw."""
    seen = []
    component, _, rest = path.partition(".")
    module = getattr(pipeline, component).get_submodule(rest)
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(as_bytes(output)))
    try:
        bare_run(pipeline, setting)
    finally:
        handle.remove()
    return seen


class Kernel(TorchFunctionMode):
    """Keeps the softmax of what goes to the kernel, image to text, of the last row of each batch."""

    def __init__(self, joint):
        super().__init__()
        self.joint = joint
        self.maps = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is KERNEL:
            given = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
            query, key = given["query"][-1].float(), given["key"][-1].float()
            weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1).mean(0)
            if self.joint and weights.shape[0] == weights.shape[1] > WORDS:
                self.maps.append(weights[WORDS:, :WORDS].T)
            elif not self.joint and weights.shape[1] == WORDS != weights.shape[0]:
                self.maps.append(weights.T)
        return func(*args, **kwargs)


def model_under(setting):
    """Return the pipeline with the setting, its model, and a record of it from before."""
    pipeline = setting.build()
    pipeline.set_progress_bar_config(disable=True)
    model = DiffusionModel(pipeline)
    source = model.record(**setting.arguments, seed=0)
    setting.apply(pipeline)
    return pipeline, model, source


def refused_before_the_run(setting, pipeline, model, ask):
    """Check that what is asked is refused by name, that nothing ran, and that the way out is one."""
    before = footprint(pipeline)
    watched = [model.components[setting.denoiser], pipeline.text_encoder]
    with forwards_of(getattr(watched[0], "_orig_mod", watched[0])) as calls, forwards_of(watched[1]) as reads:
        with pytest.raises(GuardError, match=setting.says):
            ask()
        assert calls == reads == []
    assert footprint(pipeline) == before
    setting.undo(pipeline)
    ask()


def test_the_table_has_what_is_tested():
    assert list(TABLE) == list(SETTINGS)
    assert {outcome for row in TABLE.values() for outcome in row.values()} == {"works", "refused"}
    assert TABLE["nothing set"] == dict.fromkeys(COLUMNS, "works")


@outcomes("sites", "works")
def test_a_site_has_what_a_plain_hook_sees_and_looking_changes_nothing(setting):
    pipeline, model, _ = model_under(setting)
    bare = bare_run(pipeline, setting)
    seen = hooked_run(pipeline, setting, setting.site)
    record = model.record(**setting.arguments, seed=0, capture=[setting.site])
    assert as_bytes(record.output if setting.family == "modular" else record.images) == bare
    assert [as_bytes(each.value) for each in record.passages(setting.site)] == seen
    assert len(seen) == len(record.ledger) >= 3
    with model.generate(**setting.arguments, seed=0) as run:
        read = [as_bytes(model.site(setting.site).output.save()) for _ in run.calls]
    assert [each if isinstance(each, tuple) else list(each) for each in read] == seen
    assert as_bytes(run.latents) == as_bytes(record.latents)


@outcomes("sites", "refused")
def test_a_site_is_refused_before_the_run(setting):
    pipeline, model, _ = model_under(setting)

    def read():
        with model.generate(**setting.arguments, seed=0):
            model.site(setting.site).output  # noqa: B018

    with pytest.raises(GuardError, match=setting.says):
        read()
    refused_before_the_run(
        setting, pipeline, model, lambda: model.record(**setting.arguments, capture=[setting.site])
    )
    read()


@outcomes("maps", "works")
def test_maps_are_the_softmax_of_what_the_kernel_gets(setting):
    pipeline, model, _ = model_under(setting)
    bare = bare_run(pipeline, setting)
    # The latents only: the autoencoder's own attention is not asked for.
    with Kernel(joint=setting.family == "flux") as kernel:
        bare_run(pipeline, setting, output_type="latent")
    record = model.record(**setting.arguments, seed=0, capture=[Attention()])
    assert as_bytes(record.output if setting.family == "modular" else record.images) == bare
    layers = record.attention.layers
    calls = [call for call, row in enumerate(record.ledger) if row.has("cond")]
    assert len(kernel.maps) == len(layers) * len(record.ledger)
    for index, maps in enumerate(layers.values()):
        for at, call in enumerate(calls):
            expected = kernel.maps[call * len(layers) + index]
            assert (maps[at] - expected).abs().max() <= 1e-6
            assert (maps[at] - expected.flip(1)).abs().max() > 1e-6


@outcomes("maps", "refused")
def test_maps_are_refused_before_the_run(setting):
    pipeline, model, _ = model_under(setting)
    named = list(layers_of(pipeline, setting))[:1]
    with pytest.raises(GuardError, match=setting.says):
        model.record(**setting.arguments, capture=[Attention(sites=named)])
    refused_before_the_run(
        setting, pipeline, model, lambda: model.record(**setting.arguments, capture=[Attention()])
    )


def layers_of(pipeline, setting):
    denoiser = pipeline.components[setting.denoiser]
    for path, module in getattr(denoiser, "_orig_mod", denoiser).named_modules(prefix=setting.denoiser):
        if hasattr(module, "to_q") and not path.endswith("attn1"):
            yield path


@outcomes("forks", "works")
def test_a_fork_is_exact(setting):
    _, model, _ = model_under(setting)
    whole = model.record(**setting.arguments, seed=0, capture=[setting.denoiser])
    fork = whole.fork(1)
    assert len(whole.ledger) >= 3
    assert as_bytes(fork.latents) == as_bytes(whole.latents)
    assert as_bytes(fork.output["images"] if isinstance(fork.output, dict) else fork.output) == as_bytes(
        whole.output["images"] if isinstance(whole.output, dict) else whole.output
    )


@outcomes("forks", "refused")
def test_a_fork_is_refused_before_the_run(setting):
    pipeline, model, source = model_under(setting)
    refused_before_the_run(setting, pipeline, model, lambda: source.fork(1))


# What the remarks of the table say


@pytest.mark.parametrize(
    "name", ["torch.compile", "FirstBlockCache", "PyramidAttentionBroadcast", "FasterCache"]
)
def test_the_denoiser_itself_can_be_traced_where_its_inside_cannot(name):
    setting = SETTINGS[name]
    pipeline, model, source = model_under(setting)
    bare = bare_run(pipeline, setting)
    seen = hooked_run(pipeline, setting, setting.denoiser)
    record = model.record(**setting.arguments, seed=0, capture=[setting.denoiser])
    assert as_bytes(record.images) == bare
    assert [as_bytes(each.value) for each in record.passages(setting.denoiser)] == seen
    assert record.ledger == source.ledger
    # Control: the caches do skip something here.
    assert (as_bytes(record.latents) == as_bytes(source.latents)) == (name == "torch.compile")


def test_what_lies_outside_of_compiled_blocks_can_be_traced():
    setting = SETTINGS["compiled blocks"]
    pipeline, model, _ = model_under(setting)
    bare = bare_run(pipeline, setting)
    site = "transformer.proj_out"
    seen = hooked_run(pipeline, setting, site)
    record = model.record(**setting.arguments, seed=0, capture=[site])
    assert as_bytes(record.images) == bare
    assert [as_bytes(each.value) for each in record.passages(site)] == seen
    # Control: inside of them, a hook does not fire.
    assert hooked_run(pipeline, setting, "transformer.transformer_blocks.0.ff") == []


def test_other_components_can_be_traced_whatever_the_denoiser_is():
    setting = SETTINGS["compiled blocks"]
    _, model, _ = model_under(setting)
    for path in ("text_encoder.embeddings", "vae.decoder", "transformer", "transformer.x_embedder"):
        check(model.components, [Site(path)])


def test_looking_at_shapes_puts_no_hook_into_what_is_compiled():
    pipeline = tiny.flux()
    compile_blocks(pipeline)
    model = DiffusionModel(pipeline)
    model.record(**SETTINGS["compiled blocks"].arguments, seed=0)
    assert "transformer.proj_out" in model.shapes
    assert not [path for path in model.shapes if path.startswith("transformer.transformer_blocks.0")]


@pytest.mark.parametrize(
    ("family", "site", "instead"),
    [
        ("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "to_qkv"),
        ("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "to_kv"),
        ("flux", "transformer.transformer_blocks.0.attn.to_k", "to_qkv"),
        ("flux", "transformer.transformer_blocks.0.attn.add_k_proj", "to_added_qkv"),
    ],
)
def test_a_projection_that_is_fused_with_others_is_refused_until_it_is_not(family, site, instead):
    setting = Setting(family=family)
    pipeline = setting.build()
    denoiser = pipeline.components[setting.denoiser]
    model = DiffusionModel(pipeline)
    denoiser.fuse_qkv_projections()
    with pytest.raises(GuardError, match=rf"calls {instead} and never.*{setting.denoiser}\.unfuse_qkv"):
        model.record(**setting.arguments, capture=[site])
    fused = f"{site.rpartition('.')[0]}.{instead}"
    assert len(model.record(**setting.arguments, capture=[fused])[fused]) == 3
    query = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    if family == "sd1":
        assert len(model.record(**setting.arguments, capture=[query])[query]) == 3
    denoiser.unfuse_qkv_projections()
    assert len(model.record(**setting.arguments, capture=[site])[site]) == 3


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_maps_of_joint_attention_are_those_of_unfused_projections(family):
    case = tiny.CASES[family]
    pipeline = case.build()
    arguments = {**case.arguments, "num_inference_steps": 1}
    model = DiffusionModel(pipeline)
    plain = model.record(**arguments, seed=0, capture=[Attention()]).attention.layers
    pipeline.transformer.fuse_qkv_projections()
    fused = model.record(**arguments, seed=0, capture=[Attention()]).attention.layers
    assert list(fused) == list(plain)
    for path, maps in fused.items():
        assert (maps - plain[path]).abs().max() <= 1e-6


def test_a_modular_pipelines_images_are_found_in_what_it_returns():
    setting = SETTINGS["modular pipeline"]
    pipeline = setting.build()
    pipeline.set_progress_bar_config(disable=True)
    model = DiffusionModel(pipeline)
    asked = model.record(**setting.arguments, seed=0)
    whole = model.record(**{**setting.arguments, "output": None}, seed=0)
    bare = bare_run(pipeline, setting)
    assert as_bytes(asked.images) == as_bytes(whole.images) == bare
    with pytest.raises(UnknownNameError, match="returned no frames"):
        whole.frames  # noqa: B018


def test_a_cache_applied_by_hand_is_found_too():
    from diffusers.hooks import apply_first_block_cache

    pipeline = tiny.flux()
    model = DiffusionModel(pipeline)
    source = model.record(**SETTINGS["FirstBlockCache"].arguments, seed=0)
    apply_first_block_cache(pipeline.transformer, first_block(pipeline))
    assert not pipeline.transformer.is_cache_enabled
    inside = "transformer.transformer_blocks.0.ff"
    with pytest.raises(GuardError, match=r"transformer_blocks\.0\._diffusers_hook\.remove_hook\('fbc_"):
        model.record(**SETTINGS["FirstBlockCache"].arguments, capture=[inside])
    with pytest.raises(GuardError, match="a fork would find empty"):
        source.fork(1)


class Manual:
    """A processor of the user's own that computes attention by hand."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (attn.head_to_batch_dim(each) for each in (query, key, value))
        weights = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, -1)
        return attn.to_out[0](attn.batch_to_head_dim(weights @ value))


class Wrapped:
    """A processor of the user's own that leaves the work to another."""

    def __init__(self, inner, times=1):
        self.inner, self.times = inner, times

    def __call__(self, *args, **kwargs):
        return [self.inner(*args, **kwargs) for _ in range(self.times)][-1]


def attention_under(processor):
    pipeline = tiny.sd1()
    pipeline.unet.set_attn_processor(processor)
    arguments = SETTINGS["nothing set"].arguments
    return DiffusionModel(pipeline).record(**arguments, capture=[Attention()]).attention


def test_a_processor_that_calls_the_kernel_by_another_is_taken():
    assert len(attention_under(Wrapped(AttnProcessor2_0())).layers) == 4


def test_a_processor_that_turns_out_to_pass_the_kernel_by_is_named():
    with pytest.raises(GuardError, match=r"attn2 attends to text, but never through scaled_dot_product"):
        attention_under(Manual())


def test_a_layer_that_computes_attention_twice_in_a_call_has_no_one_map():
    with pytest.raises(GuardError, match=r"attn2 computes attention twice in call 0"):
        attention_under(Wrapped(AttnProcessor2_0(), times=2))
