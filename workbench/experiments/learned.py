"""Metrics by trained networks: they load with the ordinary libraries, once a process, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from workbench.errors import InputError, LoadError
from workbench.experiments.metrics import pixels

T = TypeVar("T")


def clip_score(image: Image.Image, text: str, model: str) -> float:
    """Return how well a picture fits a text to a CLIP model: 100 times the cosine, 0 where that is negative.

    Hessel et al. 2021 (arXiv:2104.08718), whose factor is 2.5.

    Args:
        image: the picture.
        text: the text.
        model: the folder or Hub id of a CLIP model with its tokenizer and image processor.

    Raises:
        LoadError: it cannot be loaded, or is no such model.
        InputError: the text is longer than the model reads.
    """
    network, processor, tokenizer = _clip(str(model))
    words = tokenizer(text, return_tensors="pt")
    length, most = words["input_ids"].shape[1], network.config.text_config.max_position_embeddings
    if length > most:
        raise InputError(f"{model} reads {most} tokens, and the text has {length}: {text!r}. Shorten it.")
    with torch.no_grad():
        seen = _features(network.get_image_features(**_prepared(processor, image)))
        said = _features(network.get_text_features(**words))
    return max(100 * float(functional.cosine_similarity(seen, said)), 0.0)


def dino(first: Image.Image, second: Image.Image, model: str) -> float:
    """Return how alike two pictures are to a DINO model: the cosine of their class tokens, at most 1.

    Caron et al. 2021 (arXiv:2104.14294); as a metric of a subject kept, Ruiz et al. 2023 (arXiv:2208.12242).

    Args:
        first: a picture.
        second: another, of any size.
        model: the folder or Hub id of a DINO or DINOv2 model with its image processor.

    Raises:
        LoadError: it cannot be loaded.
    """
    network, processor = _vision(str(model))
    with torch.no_grad():
        one, other = (
            network(**_prepared(processor, each)).last_hidden_state[:, 0] for each in (first, second)
        )
    return float(functional.cosine_similarity(one, other))


def lpips(first: Image.Image, second: Image.Image, net: str = "alex") -> float:
    """Return how far apart two pictures are to a network's features; 0 for equal ones.

    Zhang et al. 2018 (arXiv:1801.03924), by the authors' package ``lpips``, which loads the network's weights
    from torch's cache or the net.

    Args:
        first: a picture.
        second: another of the same size.
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``.

    Raises:
        LoadError: the package or the weights are not there.
        InputError: pictures of different sizes, or no such network.
    """
    if net not in ("alex", "vgg", "squeeze"):
        raise InputError(f"net={net!r} is none of 'alex', 'vgg', 'squeeze'.")
    if first.size != second.size:
        raise InputError(f"lpips compares pictures of one size, not {first.size} and {second.size}.")
    network = _lpips(net)
    one, other = (torch.from_numpy(np.moveaxis(pixels(each), 2, 0)[None] * 2 - 1) for each in (first, second))
    with torch.no_grad():
        return float(network(one, other))


def _said(load: Callable[[str], T]) -> Callable[[str], T]:
    """Remember what was loaded, and say plainly what could not be."""

    @lru_cache(maxsize=4)
    @wraps(load)
    def loaded(reference: str) -> T:
        try:
            return load(reference)
        except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise LoadError(
                f"{reference!r} cannot be loaded for this metric: {error} Give a folder with the model's "
                "configuration, weights and processor, or the id of one on the Hub."
            ) from error

    return loaded


@_said
def _clip(reference: str) -> tuple[Any, Any, Any]:
    from transformers import AutoTokenizer

    network, processor = _network(reference)
    if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
        raise ValueError(f"{type(network).__name__} compares no pictures with texts.")
    return network, processor, AutoTokenizer.from_pretrained(reference)


@_said
def _vision(reference: str) -> tuple[Any, Any]:
    network, processor = _network(reference)
    if network.main_input_name != "pixel_values" or hasattr(network, "get_text_features"):
        raise ValueError(f"{type(network).__name__} is no model of pictures alone.")
    return network, processor


def _network(reference: str) -> tuple[Any, Any]:
    """Return a model of transformers, all its weights from its files, and its image processor."""
    from transformers import AutoImageProcessor, AutoModel

    network, info = AutoModel.from_pretrained(reference, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"Its files lack {len(info['missing_keys'])} of its weights.")
    return network.eval(), AutoImageProcessor.from_pretrained(reference)


@lru_cache(maxsize=3)
def _lpips(net: str) -> Any:
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise LoadError(
            "lpips is not installed: pip install 'diffusion-workbench[metrics]', or take 'ssim' or 'dino'."
        ) from error
    except RuntimeError as error:
        raise LoadError(
            f"lpips cannot be imported: {error}. It needs the torchvision that was built for this torch."
        ) from error
    try:
        return LPIPS(net=net, verbose=False).eval()
    except (OSError, RuntimeError) as error:
        raise LoadError(
            f"The weights of lpips' {net!r} are not there and cannot be fetched: {error} Put them into "
            f"{os.path.join(torch.hub.get_dir(), 'checkpoints')}."
        ) from error


def _prepared(processor: Any, image: Image.Image) -> dict[str, Any]:
    prepared: dict[str, Any] = processor(images=image.convert("RGB"), return_tensors="pt")
    return {"pixel_values": prepared["pixel_values"]}


def _features(found: Any) -> torch.Tensor:
    """Return the projected features, which transformers hands over in an output."""
    features: torch.Tensor = getattr(found, "pooler_output", found)
    return features
