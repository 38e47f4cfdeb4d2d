"""What tells the weights of two models apart."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def weights_hash(model: Any) -> str:
    """Return the SHA-256 of all weights of a model's components, as ``"sha256:…"``.

    The same weights in another dtype have another hash: what they compute differs.

    Args:
        model: with ``components``; it is opened if it is not yet.
    """
    model.dispatch()
    digest = hashlib.sha256()
    for name, part in sorted(model.components.items()):
        for path, value in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else ():
            plain = value.detach().cpu().contiguous()
            digest.update(f"{name}.{path} {tuple(plain.shape)} {plain.dtype}\n".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
