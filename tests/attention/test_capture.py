"""Captured maps are the softmax that the kernel computed: by hooks, and by a kernel fed one-hot values."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional

from tests import tiny
from tests.attention.seen import KERNEL, Kernel, Seen, watched
from tests.watching import as_bytes, footprint
from workbench.attention import batching, softmax
from workbench.attention.request import Attention
from workbench.attention.softmax import weights
from workbench.errors import GuardError, InputError, UnknownNameError
from workbench.models.model import DiffusionModel

TOLERANCE = 1e-6
TEXT = {"sd3": 48, "flux": 24, "flux-cfg": 24, "pixart": 24}


def test_cross_attention_is_the_softmax_of_the_projections():
    pipeline = tiny.sd1()
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    layer = pipeline.unet.get_submodule(path.removeprefix("unet."))
    queries, keys = [], []
    hooks = [
        layer.to_q.register_forward_hook(lambda _m, _i, out: queries.append(out.clone())),
        layer.to_k.register_forward_hook(lambda _m, _i, out: keys.append(out.clone())),
    ]
    record = DiffusionModel(pipeline).record(**tiny.CASES["sd1"].arguments, seed=0, capture=[Attention()])
    for hook in hooks:
        hook.remove()
    assert len(queries) == 4
    for call, (query, key) in enumerate(zip(queries, keys, strict=True)):
        # Row 0 of the batch is without words, row 1 with them.
        query, key = (each[1].unflatten(-1, (layer.heads, -1)).transpose(0, 1) for each in (query, key))
        weights = torch.softmax(query @ key.transpose(-1, -2) * layer.scale, -1).mean(0)
        kept = record.attention.layers[path][call]
        assert kept.shape == (24, 16)
        assert (kept - weights.T).abs().max() <= TOLERANCE
        without = torch.softmax(queries[call][0] @ keys[call][0].T * layer.scale, -1)
        assert (kept - without.T).abs().max() > TOLERANCE


def test_where_all_keys_are_words_the_weights_sum_to_one():
    record, _ = watched("sd1")
    for maps in record.attention.layers.values():
        assert torch.allclose(maps.sum(1), torch.ones(4, maps.shape[-1]), atol=1e-5)
    joint, _ = watched("sd3")
    for maps in joint.attention.layers.values():
        assert (maps.sum(1) < 0.999).all()
        assert (maps.sum(1) > 0).all()


@pytest.mark.parametrize(
    ("name", "text_first", "layers"),
    [
        ("sd3", False, 2),
        ("flux", True, 2),
        ("flux-cfg", True, 2),
    ],
)
def test_joint_attention_is_what_the_kernel_computed(name, text_first, layers):
    record, kernel = watched(name)
    text = TEXT[name]
    assert len(record.attention.layers) == layers
    calls = {row.call: row for row in record.ledger if "cond" in row.branches}
    assert [row.call for row in record.attention.rows] == list(calls)
    for path, maps in record.attention.layers.items():
        seen = kernel.of(path)
        assert len(seen) == len(record.ledger)
        for index, row in enumerate(calls.values()):
            weights = seen[row.call].weights()[row.branches.index("cond")].mean(0)
            words = slice(0, text) if text_first else slice(-text, None)
            image = slice(text, None) if text_first else slice(0, -text)
            assert (maps[index] - weights[image, words].T).abs().max() <= TOLERANCE
            assert (maps[index] - weights[image, words].T.flip(0)).abs().max() > TOLERANCE


@pytest.mark.parametrize(("name", "length"), [("sd3", 40), ("flux", 16)])
def test_order_is_known_also_where_text_and_image_are_equally_long(name, length):
    case = tiny.CASES[name]
    pipeline = case.build()
    arguments = {**case.arguments, "max_sequence_length": length, "num_inference_steps": 1}
    with Kernel(pipeline, "transformer") as kernel:
        record = DiffusionModel(pipeline).record(**arguments, seed=0, capture=[Attention()])
    path, maps = next(iter(record.attention.layers.items()))
    weights = kernel.of(path)[0].weights()[-1].mean(0)
    half = weights.shape[0] // 2
    assert maps.shape[1:] == (half, half)
    first, second = slice(0, half), slice(half, None)
    image, words = (second, first) if name == "flux" else (first, second)
    assert (maps[0] - weights[image, words].T).abs().max() <= TOLERANCE
    assert (maps[0] - weights[words, image].T).abs().max() > TOLERANCE


def test_masked_padding_is_the_branchs_own():
    """PixArt masks padding, and the negative prompt's mask is another than the prompt's."""
    record, kernel = watched("pixart")
    for path, maps in record.attention.layers.items():
        for call, seen in enumerate(kernel.of(path)):
            mean = seen.weights().mean(1)
            assert (maps[call] - mean[1].T).abs().max() <= TOLERANCE
            other = Seen(path, seen.query[1:], seen.key[1:], seen.mask[:1]).weights().mean(1)
            assert (maps[call] - other[0].T).abs().max() > TOLERANCE


def test_other_branch_is_the_other_row():
    cond, kernel = watched("sd1")
    uncond, _ = watched("sd1", branch="uncond")
    path = next(iter(cond.attention.layers))
    expected = kernel.of(path)[0].weights()[0].mean(0).T
    assert (uncond.attention.layers[path][0] - expected).abs().max() <= TOLERANCE
    assert (cond.attention.layers[path][0] - expected).abs().max() > TOLERANCE


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux-cfg"])
def test_looking_at_attention_changes_no_byte_and_leaves_nothing(name):
    case = tiny.CASES[name]
    pipeline = case.build()
    bare = pipeline(**case.arguments, generator=torch.Generator("cpu").manual_seed(0))
    before = footprint(pipeline)
    record = DiffusionModel(pipeline).record(**case.arguments, seed=0, capture=[Attention()])
    assert as_bytes(record.images) == as_bytes(bare.images)
    assert footprint(pipeline) == before
    assert record.attention.layers


def test_only_the_asked_steps_and_sites_are_kept():
    whole, _ = watched("sd1")
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    some, _ = watched("sd1", sites=[path], steps=[1, -1])
    assert list(some.attention.layers) == [path]
    assert [row.step for row in some.attention.rows] == [1, 3]
    assert torch.equal(some.attention.layers[path], whole.attention.layers[path][[1, 3]])
    with pytest.raises(InputError, match="Steps that were kept: 1, 3"):
        some.attention.map("red", step=0, size=(16, 16))


def test_step_the_run_does_not_have_is_refused():
    with pytest.raises(InputError, match="4 steps"):
        watched("sd1", steps=[7])


def test_unknown_layer_names_the_nearest():
    with pytest.raises(
        UnknownNameError, match=r"unet\.mid_block\.attentions\.0\.transformer_blocks\.0\.attn2"
    ):
        watched("sd1", sites=["unet.mid_block.attentions.0.transformer_blocks.0.attn3"])
    with pytest.raises(UnknownNameError, match="is no attention layer"):
        watched("sd1", sites=["unet.mid_block"])


def test_layer_that_sees_no_words_is_refused():
    with pytest.raises(InputError, match="attn1 does not attend to text"):
        watched("sd1", sites=["unet.mid_block.attentions.0.transformer_blocks.0.attn1"])


def test_sliced_attention_is_refused_by_name():
    pipeline = tiny.sd1()
    pipeline.enable_attention_slicing(1)
    with pytest.raises(GuardError, match="disable_attention_slicing"):
        DiffusionModel(pipeline).record(**tiny.CASES["sd1"].arguments, capture=[Attention()])
    pipeline.disable_attention_slicing()
    record = DiffusionModel(pipeline).record(**tiny.CASES["sd1"].arguments, capture=[Attention()])
    assert record.attention.layers


def test_each_layer_keeps_its_own_calls_where_two_denoisers_take_turns():
    record, _ = watched("wan22")
    first = [row.call for row in record.ledger if row.component == "transformer" and row.has("cond")]
    second = [row.call for row in record.ledger if row.component == "transformer_2" and row.has("cond")]
    assert first
    assert second
    for path, maps in record.attention.layers.items():
        calls = first if path.startswith("transformer.") else second
        assert len(maps) == len(calls)
        assert [row.call for row in record.attention.rows_of(path)] == calls


def plain(query, key, scale, mask=None):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


MASKS = {
    "none": lambda draw: None,
    "keys": lambda draw: torch.tensor([True] * 5 + [False] * 4),
    "boolean": lambda draw: torch.randn(1, 1, 7, 9, generator=draw) > -1,
    "additive": lambda draw: torch.randn(2, 1, 1, 9, generator=draw),
    "each head": lambda draw: torch.randn(2, 4, 7, 9, generator=draw),
}


@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("mask", list(MASKS))
def test_weights_are_the_plain_formula(monkeypatch, mask, heads, chunk):
    monkeypatch.setattr(softmax, "_CHUNK", chunk)
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 7, 8, generator=draw)
    key = torch.randn(2, heads, 9, 8, generator=draw)
    given = MASKS[mask](draw)
    where = {"queries": slice(2, 7), "columns": slice(1, 6), "mask": given}
    found = weights(query, key, **where, over_heads="mean", scale=0.5)
    expected = plain(query, key, 0.5, given).mean(1)[:, 2:7, 1:6]
    assert found.shape == (2, 5, 5)
    assert (found - expected).abs().max() <= TOLERANCE
    unscaled = weights(query, key, **where, over_heads="mean")
    assert (unscaled - plain(query, key, 8**-0.5, given).mean(1)[:, 2:7, 1:6]).abs().max() <= TOLERANCE
    apart = weights(query, key, **where, heads=[3, 1], scale=0.5)
    every = plain(query, key, 0.5, given)
    assert (apart - every[:, [3, 1], 2:7, 1:6]).abs().max() <= TOLERANCE
    scattered = weights(
        query,
        key,
        queries=torch.tensor([5, 0]),
        columns=torch.tensor([8, 2, 2]),
        over_heads="max",
        scale=0.5,
        mask=given,
    )
    assert (scattered - every.amax(1)[:, [5, 0]][:, :, [8, 2, 2]]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "layer"),
    [("auraflow", "single_transformer_blocks.0.attn"), ("lumina2", "layers.0.attn")],
)
@pytest.mark.parametrize("block", ["image->text", "image->image"])
def test_a_layer_given_image_and_text_as_one_is_refused(name, layer, block):
    case = tiny.FAMILIES[name]
    model = DiffusionModel(case.build())
    with pytest.raises(GuardError, match=f"{layer} puts image and text together by itself"):
        model.record(**case.arguments, seed=0, capture=[Attention(block=block)])


def test_layers_that_refine_the_text_or_look_along_frames_are_no_picture():
    case = tiny.FAMILIES["lumina2"]
    picture = Attention(block="image->image", sites=["transformer.noise_refiner.0.attn"])
    model = DiffusionModel(case.build())
    maps = model.record(**case.arguments, seed=0, capture=[picture]).attention
    assert set(maps.layers) == {"transformer.noise_refiner.0.attn"}
    text = Attention(block="image->image", sites=["transformer.context_refiner.0.attn"])
    with pytest.raises(InputError, match="has no attention image->image"):
        model.record(**case.arguments, seed=0, capture=[text])
    case = tiny.FAMILIES["animatediff"]
    every = Attention(block="image->image")
    maps = DiffusionModel(case.build()).record(**case.arguments, seed=0, capture=[every]).attention
    assert maps.layers
    assert not any("motion" in path for path in maps.layers)


def test_a_branch_that_the_run_has_not_is_an_error():
    with pytest.raises(UnknownNameError, match="no branch 'uncond'"):
        watched("flux", branch="uncond")


def test_words_of_a_prompt_behind_a_template_are_found():
    record, _ = watched("qwen-image")
    words = [word.text for word in record.attention.words]
    assert words.count("·") == 0
    assert {"a", "red", "circle"} <= {word.partition("<")[0] for word in words}


class Between:
    """Lets another run begin and end between the steps of a run."""

    def __init__(self, other):
        self.other = other
        self.records = []

    def started(self, row):
        pass

    def ticked(self, tick, latents):
        self.records.append(self.other())


def test_runs_of_two_models_at_once_see_each_their_own():
    one, other = (DiffusionModel(tiny.sd1()) for _ in range(2))
    asked = {**tiny.CASES["sd1"].arguments, "seed": 0, "capture": [Attention()]}
    alone = one.record(**asked)
    between = Between(lambda: other.record(**asked))
    record = one.record(**asked, listener=between)
    assert functional.scaled_dot_product_attention is KERNEL
    for each in (record, *between.records):
        assert each.attention.layers.keys() == alone.attention.layers.keys()
        for path, maps in each.attention.layers.items():
            assert torch.equal(maps, alone.attention.layers[path])


def test_a_frame_is_chosen_where_each_is_attended_to_by_itself():
    case = tiny.FAMILIES["animatediff"]
    model = DiffusionModel(case.build())
    path = next(iter(model.record(**case.arguments, seed=0, capture=[Attention()]).attention.layers))
    found = []
    for frame in (0, 1):
        asked = [Attention(sites=[path], frame=frame, reduce=[]), f"{path}:query", f"{path}:key"]
        record = model.record(**case.arguments, seed=0, capture=asked)
        query, key = (record.at(f"{path}:{port}", step=1, branch="cond")[frame] for port in ("query", "key"))
        exact = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
        found.append(record.attention.layers[path][1])
        assert (found[-1] - exact.transpose(-1, -2)).abs().max() <= TOLERANCE
    assert (found[0] - found[1]).abs().max() > TOLERANCE
    with pytest.raises(InputError, match="2 frames by themselves"):
        model.record(**case.arguments, seed=0, capture=[Attention(frame=2)])
    with pytest.raises(InputError, match="no frame"):
        Attention(frame=-1)


@pytest.mark.parametrize("asked", [{}, {"words": ["red"], "reduce": []}, {"top": 2}, {"reduce": ["steps"]}])
@pytest.mark.parametrize("name", ["sd1", "sd3", "wan"])
def test_weights_computed_for_several_calls_at_once_are_each_calls_own(monkeypatch, name, asked):
    case = tiny.FAMILIES[name]
    model = DiffusionModel(case.build())
    found, sizes = {}, []
    for held in (0, 1 << 30):
        monkeypatch.setattr(batching, "ROOM", held)
        monkeypatch.setattr(
            batching,
            "weights",
            lambda query, *rest, **told: (sizes.append(len(query)), weights(query, *rest, **told))[1],
        )
        sizes.clear()
        found[held] = model.record(**case.arguments, seed=0, capture=[Attention(**asked)]).attention
        assert (max(sizes) > 1) == bool(held)
    one, several = found.values()
    # Each layer's first call by itself, for its time; then those of all layers alike at once.
    assert len(sizes) < 2 * len(several.layers)
    assert one.layers.keys() == several.layers.keys()
    for path, kept in one.layers.items():
        assert several.layers[path].shape == kept.shape
        assert torch.allclose(several.layers[path], kept, atol=1e-6)
    assert [row.call for row in one.rows] == [row.call for row in several.rows]


class Writing:
    """A processor that hands the kernel its query in memory which each call writes over."""

    room = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(given).unflatten(-1, (attn.heads, -1)).transpose(1, 2).contiguous()
            for project, given in ((attn.to_q, hidden_states), (attn.to_k, read), (attn.to_v, read))
        )
        self.room = torch.empty_like(query) if self.room is None else self.room
        made = functional.scaled_dot_product_attention(self.room.copy_(query), key, value)
        return attn.to_out[1](attn.to_out[0](made.transpose(1, 2).flatten(2)))


def test_a_query_that_the_layer_writes_over_later_is_kept(monkeypatch):
    model = DiffusionModel(tiny.sd1())
    unet = model.pipeline.unet
    unet.set_attn_processor({name: Writing() for name in unet.attn_processors})
    found = []
    for held in (0, 1 << 30):
        monkeypatch.setattr(batching, "ROOM", held)
        told = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 0, "output_type": "latent"}
        found.append(model.record("a red circle", capture=[Attention()], **told).attention.layers)
    at_once, later = found
    assert all(torch.allclose(later[path], kept, atol=1e-6) for path, kept in at_once.items())
    assert any(not torch.allclose(kept[0], kept[3], atol=1e-3) for kept in at_once.values())


def test_maps_of_a_pipeline_in_inference_mode_and_autocast():
    class Within(StableDiffusionPipeline):
        @torch.inference_mode()
        def __call__(self, *args, **kwargs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().__call__(*args, **kwargs)

    pipeline = tiny.sd1()
    model = DiffusionModel(Within(**pipeline.components, requires_safety_checker=False))
    for reduce in ((), ("steps",), ("heads",)):
        maps = model.record(
            "a red circle", num_inference_steps=4, capture=[Attention(reduce=reduce)]
        ).attention
        assert all(kept.isfinite().all() for kept in maps.layers.values())
