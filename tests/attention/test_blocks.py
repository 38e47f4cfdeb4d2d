"""Whose queries look at whose keys: every block, chosen parts of it, and what is reduced on the way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests import tiny
from tests.attention.seen import watched
from tests.watching import as_bytes
from workbench.attention.request import Attention
from workbench.errors import GuardError, InputError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.storage.saved import load_record

TOLERANCE = 1e-6
CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SELF = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
JOINT = {"sd3": (False, 48), "flux": (True, 24), "cogvideox": (True, 24), "hunyuan-video": (False, 24)}
SIZE = (16, 16)


def parts(name, seen):
    """Return the slices of image and text in one call."""
    text_first, length = JOINT[name]
    total = seen.key.shape[2]
    text = slice(0, length) if text_first else slice(total - length, total)
    image = slice(length, total) if text_first else slice(0, total - length)
    return {"image": image, "text": text}


@pytest.mark.parametrize("block", ["image->text", "text->image", "image->image", "text->text"])
@pytest.mark.parametrize("name", list(JOINT))
def test_each_block_of_joint_attention_is_the_kernels(name, block):
    record, kernel = watched(name, block=block)
    asking, looked_at = block.split("->")
    assert len(record.attention.layers) == 2
    for path, maps in record.attention.layers.items():
        for index, seen in enumerate(kernel.of(path)):
            where = parts(name, seen)
            expected = seen.weights()[-1].mean(0)[where[asking], where[looked_at]]
            expected = expected.T if block == "image->text" else expected
            assert maps[index].shape == expected.shape
            assert (maps[index] - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", list(JOINT))
def test_the_blocks_of_a_query_sum_to_one(name):
    case = tiny.FAMILIES[name]
    asked = [Attention(block=block) for block in ("image->text", "image->image", "text->image", "text->text")]
    record = DiffusionModel(case.build()).record(**case.arguments, seed=0, capture=asked)
    to_text, to_image, from_text, in_text = record.attention
    for path, maps in to_text.layers.items():
        of_image = maps.sum(1) + to_image.layers[path].sum(2)
        of_text = from_text.layers[path].sum(2) + in_text.layers[path].sum(2)
        assert torch.allclose(of_image, torch.ones_like(of_image), atol=1e-5)
        assert torch.allclose(of_text, torch.ones_like(of_text), atol=1e-5)


def test_self_attention_and_cross_attention_each_have_one_block():
    own, kernel = watched("sd1", block="image->image")
    assert all(path.endswith("attn1") for path in own.attention.layers)
    for path, maps in own.attention.layers.items():
        for index, seen in enumerate(kernel.of(path)):
            assert (maps[index] - seen.weights()[1].mean(0)).abs().max() <= TOLERANCE
    cross, _ = watched("sd1")
    assert all(path.endswith("attn2") for path in cross.attention.layers)
    with pytest.raises(InputError, match="attn2 has no attention image->image"):
        watched("sd1", block="image->image", sites=[CROSS])


def test_heads_are_kept_apart_and_chosen():
    whole, kernel = watched("sd1", reduce=[], sites=[CROSS])
    some, _ = watched("sd1", reduce=[], sites=[CROSS], heads=[1])
    largest, _ = watched("sd1", reduce={"heads": "max"}, sites=[CROSS])
    for index, seen in enumerate(kernel.of(CROSS)):
        expected = seen.weights()[1].transpose(-1, -2)
        assert (whole.attention.layers[CROSS][index] - expected).abs().max() <= TOLERANCE
        assert (some.attention.layers[CROSS][index] - expected[[1]]).abs().max() <= TOLERANCE
        assert (largest.attention.layers[CROSS][index] - expected.amax(0)).abs().max() <= TOLERANCE
    maps = whole.attention
    one = [maps.map("red", step=2, size=SIZE, layer=CROSS, head=head) for head in (0, 1)]
    assert torch.allclose(maps.map("red", step=2, size=SIZE, layer=CROSS), torch.stack(one).mean(0))
    assert torch.equal(some.attention.map("red", step=2, size=SIZE, layer=CROSS, head=1), one[1])
    with pytest.raises(InputError, match=r"Head 0 .* was not kept"):
        some.attention.map("red", step=2, size=SIZE, layer=CROSS, head=0)
    with pytest.raises(InputError, match="Heads were reduced"):
        largest.attention.map("red", step=2, size=SIZE, head=0)


def test_words_are_chosen_by_name_phrase_place_and_characters():
    whole, _ = watched("sd1")
    prompt = "a red circle"
    for asked, columns in (("red", [2]), ("red circle", [2, 3]), (2, [2]), ((2, 5), [2]), ((4, 7), [2, 3])):
        some, _ = watched("sd1", words=[asked])
        for path, maps in some.attention.layers.items():
            assert torch.equal(maps, whole.attention.layers[path][:, columns])
        (word,) = some.attention.words
        assert word.span is not None
        assert prompt[slice(*word.span)] == word.text
        kept = some.attention.map(0, step=1, size=SIZE)
        assert torch.allclose(kept, sum(whole.attention.map(each, step=1, size=SIZE) for each in columns))
    with pytest.raises(UnknownNameError, match="no word 'green'"):
        watched("sd1", words=["green"])


def test_places_are_chosen_by_position_and_by_point():
    whole, _ = watched("sd1", block="image->image", sites=[SELF])
    some, _ = watched("sd1", block="image->image", sites=[SELF], queries=[5, 0])
    assert torch.allclose(some.attention.layers[SELF], whole.attention.layers[SELF][:, [5, 0]], atol=1e-6)
    # The middle block has 4 x 4 places: a little right of the middle and near the bottom is row 3, column 2.
    point, _ = watched("sd1", block="image->image", sites=[SELF], pixels=[(0.6, 0.95)])
    assert point.attention.places == {SELF: (14,)}
    assert torch.allclose(point.attention.layers[SELF], whole.attention.layers[SELF][:, [14]], atol=1e-6)
    seen = whole.attention.map_from(0.6, 0.95, size=SIZE, step=1)
    assert torch.equal(seen, whole.attention.layers[SELF][1, 14].reshape(4, 4))
    assert torch.allclose(point.attention.map_from(0.6, 0.95, size=SIZE, step=1), seen, atol=1e-6)
    everywhere, _ = watched("sd1", block="image->image", pixels=[(0.1, 0.1)])
    assert everywhere.attention.map_from(0.1, 0.1, size=SIZE).shape == (4, 4)
    with pytest.raises(InputError, match="16 queries of the image"):
        watched("sd1", block="image->image", sites=[SELF], queries=[16])
    with pytest.raises(InputError, match="outside the picture"):
        watched("sd1", block="image->image", pixels=[(1.2, 0.5)])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_steps_are_reduced_as_they_come(how):
    whole, _ = watched("sd1")
    some, _ = watched("sd1", reduce={"heads": "mean", "steps": how}, steps=range(1, 4))
    for path, maps in some.attention.layers.items():
        kept = whole.attention.layers[path][1:4]
        expected = kept.mean(0) if how == "mean" else kept.amax(0)
        assert maps.shape[0] == 1
        assert torch.allclose(maps[0], expected, atol=1e-7)
    assert some.attention.steps == (1, 2, 3)
    with pytest.raises(InputError, match="Steps were reduced"):
        some.attention.map("red", step=1, size=SIZE)
    if how == "mean":
        part, _ = watched("sd1", steps=range(1, 4))
        assert torch.allclose(some.attention.map("red", size=SIZE), part.attention.map("red", size=SIZE))


@pytest.mark.parametrize("how", ["mean", "max"])
def test_layers_are_reduced_on_the_finest_grid(how):
    whole, _ = watched("sd1")
    some, _ = watched("sd1", reduce={"heads": "mean", "layers": how})
    (maps,) = some.attention.layers.values()
    assert maps.shape == (4, 24, max(each.shape[2] for each in whole.attention.layers.values()))
    if how == "mean":
        for step in range(4):
            expected = whole.attention.map("red", step=step, size=SIZE)
            assert torch.allclose(some.attention.map("red", step=step, size=SIZE), expected, atol=1e-7)
    all_of_it, _ = watched("sd1", reduce={"heads": "mean", "layers": how, "steps": how})
    (one,) = all_of_it.attention.layers.values()
    assert torch.allclose(one[0], maps.mean(0) if how == "mean" else maps.amax(0), atol=1e-6)


def test_the_largest_keys_are_kept_and_where_they_are():
    whole, _ = watched("sd1")
    some, _ = watched("sd1", top=3)
    for path, maps in some.attention.layers.items():
        every = whole.attention.layers[path]
        assert maps.shape == (4, 3, every.shape[2])
        assert torch.equal(maps, every.topk(3, dim=1).values)
        spread = some.attention.whole(path)
        assert torch.equal(spread.gather(1, some.attention.indices[path]), maps)
        assert ((spread == 0) | (spread == every[:, : spread.shape[1]])).all()
    own, _ = watched("sd1", block="image->image", sites=[SELF], top=2)
    assert own.attention.layers[SELF].shape == (4, 16, 2)
    assert own.attention.whole(SELF).shape == (4, 16, 16)
    every, _ = watched("sd1", block="image->image", sites=[SELF])
    kept = own.attention.whole(SELF) > 0
    assert torch.equal(own.attention.whole(SELF)[kept], every.attention.layers[SELF][kept])


def test_the_sample_that_is_asked_for():
    pipeline = tiny.sd1()
    model = DiffusionModel(pipeline)
    arguments = {"num_inference_steps": 2, "seed": [0, 0, 0, 0], "num_images_per_prompt": 2}
    prompts = ["a red circle", "a blue square"]
    both = model.record(prompts, capture=[Attention(sample=3), Attention()], **arguments)
    second, first = both.attention
    assert [word.text for word in second.words if not word.special] == ["a", "blue", "square"]
    assert [word.text for word in first.words if not word.special] == ["a", "red", "circle"]
    alone = model.record("a blue square", seed=0, num_inference_steps=2, capture=[Attention()])
    for path, maps in alone.attention.layers.items():
        assert torch.allclose(second.layers[path], maps, atol=1e-5)
        assert not torch.allclose(first.layers[path], maps, atol=1e-5)


def test_asking_changes_no_byte_whatever_is_asked():
    case = tiny.CASES["flux"]
    pipeline = case.build()
    bare = pipeline(**case.arguments, generator=torch.Generator("cpu").manual_seed(0))
    for asked in (
        {"block": "image->image", "top": 4},
        {"block": "text->image", "words": ["red"], "reduce": ["heads", "layers", "steps"]},
        {"reduce": [], "heads": [0], "dtype": torch.float16},
    ):
        record = DiffusionModel(pipeline).record(**case.arguments, seed=0, capture=[Attention(**asked)])
        assert as_bytes(record.images) == as_bytes(bare.images)
        assert record.attention.layers


def test_saved_maps_are_the_same(tmp_path):
    record, _ = watched("sd1", reduce=[], words=["red circle"], top=1)
    loaded = load_record(record.save(tmp_path / "run")).attention
    assert as_bytes(loaded.layers) == as_bytes(record.attention.layers)
    assert as_bytes(dict(loaded.indices)) == as_bytes(dict(record.attention.indices))
    assert (loaded.words, loaded.block, loaded.heads) == (record.attention.words, "image->text", None)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"block": "image->word"}, UnknownNameError, "image->text"),
        ({"block": "image->image", "words": ["red"]}, InputError, "no text is in"),
        ({"queries": [0], "pixels": [(0, 0)]}, InputError, "same thing"),
        ({"block": "text->image", "queries": [0]}, InputError, "choose them by words"),
        ({"top": 0}, InputError, "top=0"),
        ({"top": 2, "reduce": ["steps"]}, InputError, "top keeps other keys"),
        ({"reduce": "heads"}, InputError, r"reduce=\['heads'\]"),
        ({"reduce": ["head"]}, UnknownNameError, "heads"),
        ({"reduce": {"heads": "sum"}}, UnknownNameError, "mean"),
        ({"reduce": {"layers": "mean", "steps": "max"}}, InputError, "by one method"),
        ({"words": "red"}, InputError, r"words=\['red'\]"),
        ({"words": []}, InputError, "words is empty"),
        ({"queries": [1], "reduce": ["layers"]}, InputError, "one grid"),
        ({"block": "image->image", "reduce": ["layers"]}, InputError, "other queries"),
        ({"branch": "all"}, InputError, "a map is of one branch"),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_run(asked, error, said):
    with pytest.raises(error, match=said):
        Attention(**asked)


def test_maps_say_what_they_are_not():
    own, _ = watched("sd1", block="image->image", sites=[SELF])
    with pytest.raises(InputError, match="no map of a word"):
        own.attention.map("red", size=SIZE)
    cross, _ = watched("sd1", sites=[CROSS], queries=[1])
    with pytest.raises(InputError, match="there is no picture"):
        cross.attention.map("red", size=SIZE)
    with pytest.raises(InputError, match="block='image->image'"):
        cross.attention.map_from(0, 0, size=SIZE)
    with pytest.raises(UnknownNameError, match="attn2"):
        cross.attention.whole("unet.mid")


def test_a_layer_that_attends_twice_says_so_for_every_block():
    case = tiny.FAMILIES["sd1-pag"]
    model, asked = DiffusionModel(case.build()), Attention(block="image->image", sites=[SELF])
    with pytest.raises(GuardError, match=r"for 2 rows of 3 branches|attention twice"):
        model.record(**case.arguments, seed=0, capture=[asked])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_layers_of_other_sizes_are_brought_to_the_finest(how):
    """The shipped model attends on grids of 4, 8 and 16: the words of one lie where those of another do."""
    asked = [Attention(), Attention(reduce={"heads": "mean", "layers": how})]
    record = DiffusionModel("shapes-unet").record(
        "a red circle", seed=0, num_inference_steps=1, capture=asked
    )
    apart, whole = record.attention
    assert {maps.shape[-1] for maps in apart.layers.values()} == {16, 64, 256}
    finest, count = [], len(apart.layers)
    for size in (16, 64, 256):
        alike = torch.stack([maps[0] for maps in apart.layers.values() if maps.shape[-1] == size])
        joined = alike.sum(0) / count if how == "mean" else alike.amax(0)
        grids = joined.reshape(1, -1, round(size**0.5), round(size**0.5))
        finest.append(functional.interpolate(grids, size=(16, 16), mode="bilinear").reshape(-1, 256))
    stacked = torch.stack(finest)
    (found,) = whole.layers.values()
    assert torch.allclose(found[0], stacked.sum(0) if how == "mean" else stacked.amax(0), atol=1e-6)
    assert whole.map("circle", size=SIZE).shape == SIZE


def test_a_layer_that_adds_the_texts_keys_to_the_images_has_no_queries_of_text():
    """Kandinsky's: both blocks of the image's queries, and every row of both sums to 1."""
    case = tiny.FAMILIES["kandinsky"]
    asked = [Attention(block=block) for block in ("image->text", "image->image")]
    model = DiffusionModel(case.build())
    to_text, to_image = model.record(**case.arguments, seed=0, capture=asked).attention
    path = "unet.mid_block.attentions.0"
    whole = to_text.layers[path].sum(1) + to_image.layers[path].sum(2)
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)
    assert to_image.layers[path].shape[-1] == to_image.layers[path].shape[-2] == 16
    with pytest.raises(InputError, match="has no attention text->image"):
        model.record(**case.arguments, capture=[Attention(block="text->image", sites=[path])])
