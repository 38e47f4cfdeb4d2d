"""The zoo: a small visual world whose truth is known, and models trained on it that come with the package.

``shapes`` draws scenes of one or two coloured shapes, says them in words and reads images back;
``models()`` and ``path(name)`` give the trained pipelines; ``train`` makes them again and ``evaluate`` says
how well they follow the words. Importing the zoo or ``shapes`` loads no torch.
"""

from __future__ import annotations

from pathlib import Path

from workbench.errors import UnknownNameError, nearest
from workbench.zoo import shapes as shapes

_WEIGHTS = Path(__file__).parent / "weights"

_SETTINGS: dict[str, dict[str, float]] = {
    "shapes-unet": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "shapes-planted": {"num_inference_steps": 20, "guidance_scale": 3.0},
    "shapes-mmdit": {"num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 24},
    "shapes-ddpm": {"num_inference_steps": 50},
}


def models() -> tuple[str, ...]:
    """The names of the models that come with the package."""
    return tuple(sorted(config.parent.name for config in _WEIGHTS.glob("*/model_index.json")))


def path(name: str) -> Path:
    """Where a model of the zoo lies.

    Args:
        name: one of ``models()``.

    Returns:
        A folder that ``DiffusionPipeline.from_pretrained`` opens.

    Raises:
        UnknownNameError: if there is no such model; it lists the nearest that there are.
    """
    if name not in models():
        raise UnknownNameError(f"The zoo has no model {name!r}.{nearest(name, models())}")
    return _WEIGHTS / name


def settings(name: str) -> dict[str, float]:
    """The pipeline's arguments that a model was measured with: steps, and guidance where it has words.

    Raises:
        UnknownNameError: as `path` does.
    """
    return dict(_SETTINGS[path(name).name])
