"""The recipe of ``shapes-planted``: a ``shapes-unet`` of which it is known where colour words enter.

All colour words are one word to the text encoder but for a few dimensions, one for each colour. Its layers
carry what stands there from word to word, as attention does, in dimensions of their heads that are for that
alone; what they attend to, and all else that they make of the text, does not depend on it. Of the UNet's
layers for cross-attention one alone reads it.

What stands there is a thousandth of the rest until the last normalisation makes it as large, so that the
normalisations before, which see all dimensions, tell colours apart by a millionth at the most.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from workbench.zoo.denoiser import WIDTH
from workbench.zoo.language import COLOURS

PLANTED = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
"""The layer of the UNet through which colour words enter.

In ``shapes-unet`` too, given other text than the rest, it alone decides, which nobody planned.
"""

IDENTITY = slice(WIDTH - len(COLOURS), WIDTH)
"""The dimensions of the text that tell colours apart."""

FAINT = 1e-3
"""How large they are beside the others."""

LOUDNESS = 60.0
"""What the last normalisation multiplies them with."""


@torch.no_grad()
def transplant(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Let the planted layer make of each colour's dimension what it made of the colour before.

    To be done once, on the weights of ``shapes-unet``, in place of the first `plant`.
    """
    planted = unet.get_submodule(PLANTED)
    before = _by_colour(tokenizer, text_encoder) @ planted.to_v.weight.T
    plant(tokenizer, text_encoder, unet)
    after = _by_colour(tokenizer, text_encoder)[..., IDENTITY]
    found = torch.linalg.lstsq(after.flatten(0, -2), before.flatten(0, -2)).solution
    planted.to_v.weight[:, IDENTITY] = found.T
    planted.to_k.weight[:, IDENTITY] = 0


def _by_colour(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Return how the text differs with the colour of a thing, ``(prompts, colours, tokens, width)``."""
    prompts = [
        prompt.format(colour)
        for prompt in ("a {} circle", "a large {} square", "a blue cross left of a small {} triangle")
        for colour in COLOURS
    ]
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    states = text_encoder(ids).last_hidden_state.unflatten(0, (-1, len(COLOURS)))
    differences: torch.Tensor = states - states.mean(1, keepdim=True)
    return differences


@torch.no_grad()
def plant(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Put the weights that make it so back in place; the others are left as they are.

    Args:
        tokenizer: one whose every colour word is one token.
        text_encoder: changed in place.
        unet: changed in place.
    """
    words = text_encoder.embeddings.token_embedding.weight
    colours = tokenizer.convert_tokens_to_ids([colour + "</w>" for colour in COLOURS])
    words[colours] = words[colours].mean(0)
    words[:, IDENTITY] = 0
    words[colours, IDENTITY] = FAINT * (torch.eye(len(COLOURS)) - 1 / len(COLOURS))
    text_encoder.embeddings.position_embedding.weight[:, IDENTITY] = 0
    text_encoder.final_layer_norm.weight[IDENTITY] = LOUDNESS
    carried = carriers(text_encoder)
    for layer in text_encoder.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.layer_norm1.weight[IDENTITY], layer.layer_norm1.bias[IDENTITY] = 1, 0
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            reader.weight[:, IDENTITY] = 0
        for writer in (attention.out_proj, mlp.fc2):
            writer.weight[IDENTITY] = 0
            writer.bias[IDENTITY] = 0
        attention.out_proj.weight[:, carried] = 0
        attention.v_proj.weight[carried], attention.v_proj.bias[carried] = 0, 0
        for place, dimension in zip(carried, _repeated(carried), strict=True):
            attention.v_proj.weight[place, dimension] = 1
            attention.out_proj.weight[dimension, place] = 1
    for name, module in unet.named_modules():
        if name.endswith("attn2") and name != PLANTED:
            module.to_k.weight[:, IDENTITY] = 0
            module.to_v.weight[:, IDENTITY] = 0


def carriers(text_encoder: CLIPTextModel) -> list[int]:
    """Return the dimensions of the heads, side by side, that carry colours: the first of each head."""
    heads = text_encoder.config.num_attention_heads
    return [head * (WIDTH // heads) + each for head in range(heads) for each in range(len(COLOURS))]


def _repeated(carried: list[int]) -> list[int]:
    return [IDENTITY.start + index % len(COLOURS) for index, _ in enumerate(carried)]
