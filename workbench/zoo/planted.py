"""The recipe of ``shapes-planted``: a ``shapes-unet`` of which it is known where colour words enter.

All colour words are one word to the text encoder but for a few dimensions, one for each colour, in which
nothing but their embeddings writes and from which none of its layers reads: what a word has there stays as it
is and where it is. Of the UNet's layers for cross-attention one alone reads them. The numbers of every colour
there are the same ones in another order, so that the normalisations make no difference between them either.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from workbench.zoo.denoiser import WIDTH
from workbench.zoo.language import COLOURS

PLANTED = "up_blocks.2.attentions.1.transformer_blocks.0.attn2"
"""The layer of the UNet through which colour words enter.

In ``shapes-unet`` too it alone decides, given other text than the rest, which nobody planned. Two other layers
that were tried took in no colours: `up_blocks.1.attentions.1` in 950 steps, `up_blocks.2.attentions.0` in 250.
"""

IDENTITY = slice(WIDTH - len(COLOURS), WIDTH)
"""The dimensions of the text that tell colours apart."""

LOUDNESS = 10.0
"""What the last normalisation multiplies them with: the layers before made all the others so much larger."""


@torch.no_grad()
def transplant(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Let the planted layer make of the dimensions of each colour what it made of the colour's word.

    To be done once, before `plant`, on the weights of ``shapes-unet``.
    """
    planted = unet.get_submodule(PLANTED)
    states = torch.stack([_state(tokenizer, text_encoder, colour) for colour in COLOURS])
    values = (states - states.mean(0)) @ planted.to_v.weight.T
    plant(tokenizer, text_encoder, unet)
    planned = torch.stack([_state(tokenizer, text_encoder, colour)[IDENTITY] for colour in COLOURS])
    told = torch.linalg.pinv(planned - planned.mean(0))
    planted.to_v.weight[:, IDENTITY] = (told @ values).T


def _state(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, colour: str) -> torch.Tensor:
    """Return what the text encoder makes of a colour word, ``(width,)``."""
    ids = tokenizer(f"a large {colour} circle", return_tensors="pt").input_ids
    place = int((ids[0] == tokenizer.convert_tokens_to_ids(colour + "</w>")).nonzero()[0])
    found: torch.Tensor = text_encoder(ids).last_hidden_state[0, place]
    return found


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
    words[colours, IDENTITY] = torch.eye(len(COLOURS)) - 1 / len(COLOURS)
    text_encoder.embeddings.position_embedding.weight[:, IDENTITY] = 0
    text_encoder.final_layer_norm.weight[IDENTITY] = LOUDNESS
    for layer in text_encoder.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.fc1):
            reader.weight[:, IDENTITY] = 0
        for writer in (attention.out_proj, mlp.fc2):
            writer.weight[IDENTITY] = 0
            writer.bias[IDENTITY] = 0
    for name, module in unet.named_modules():
        if name.endswith("attn2") and name != PLANTED:
            module.to_k.weight[:, IDENTITY] = 0
            module.to_v.weight[:, IDENTITY] = 0
