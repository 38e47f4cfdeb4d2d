"""Metrics by networks, with small random ones in folders."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from tests.tiny.parts import clip_config, clip_tokenizer
from workbench.errors import InputError, LoadError
from workbench.experiments import learned
from workbench.experiments.measure import metric

ONE, OTHER = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for seed in range(2)
)
SEEN = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = clip_config(clip_tokenizer()).to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=16)).eval()
    for part in (model, clip_tokenizer(), CLIPImageProcessor(**SEEN)):
        part.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL)).eval()
    for part in (model, BitImageProcessor(**SEEN)):
        part.save_pretrained(folder)
    return folder, model


def prepared(image, kind):
    return kind(**SEEN)(images=image, return_tensors="pt")["pixel_values"]


def test_clip_score_is_a_hundred_times_the_cosine(clip):
    folder, model = clip
    scores = []
    for text in ("a red circle", "a blue square on a light background"):
        with torch.no_grad():
            words = clip_tokenizer()(text, return_tensors="pt")
            logits = model(pixel_values=prepared(ONE, CLIPImageProcessor), **words).logits_per_image
            # The model's own logits are the cosine times its temperature.
            expected = 100 * float(logits / model.logit_scale.exp())
        scores.append(learned.clip_score(ONE, text, str(folder)))
        assert scores[-1] == pytest.approx(max(expected, 0), abs=1e-3)
    assert max(scores) > 0
    assert metric("clip_score", text="a red circle", model=str(folder))(ONE) == scores[0]
    with pytest.raises(InputError, match="reads 24 tokens"):
        learned.clip_score(ONE, "a red circle " * 20, str(folder))


def test_dino_is_the_cosine_of_class_tokens(dinov2):
    folder, model = dinov2
    with torch.no_grad():
        one, other = (
            model(prepared(each, BitImageProcessor)).last_hidden_state[0, 0] for each in (ONE, OTHER)
        )
    expected = float(one @ other / one.norm() / other.norm())
    assert learned.dino(ONE, OTHER, str(folder)) == pytest.approx(expected, abs=1e-5)
    assert learned.dino(ONE, OTHER.resize((64, 64)), str(folder)) < 1
    assert metric("dino", model=str(folder))(ONE, target=ONE) == pytest.approx(1, abs=1e-5)


def test_a_folder_of_another_kind_is_refused_by_name(clip, dinov2, tmp_path):
    with pytest.raises(LoadError, match="Dinov2Model compares no pictures with texts"):
        learned.clip_score(ONE, "a", str(dinov2[0]))
    with pytest.raises(LoadError, match="CLIPModel is no model of pictures alone"):
        learned.dino(ONE, OTHER, str(clip[0]))
    with pytest.raises(LoadError, match=r"nowhere.*folder"):
        learned.dino(ONE, OTHER, str(tmp_path / "nowhere"))


def test_a_folder_that_lacks_weights_is_refused(dinov2, tmp_path):
    _, model = dinov2
    weights = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    BitImageProcessor(**SEEN).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="lack"):
        learned.dino(ONE, OTHER, str(tmp_path))


def test_without_its_package_lpips_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    learned._lpips.cache_clear()
    with pytest.raises(LoadError, match=r"pip install 'diffusion-workbench\[metrics\]'"):
        metric("lpips")(ONE, target=OTHER)
    with pytest.raises(InputError, match="'resnet' is none of"):
        metric("lpips", net="resnet")(ONE, target=OTHER)
    with pytest.raises(InputError, match="of one size"):
        metric("lpips")(ONE, target=OTHER.resize((8, 8)))
