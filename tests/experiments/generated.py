"""Experiments drawn at random, of all interventions, on the shipped models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workbench import zoo
from workbench.experiments.changes import by_kind
from workbench.experiments.experiment import Experiment

STEPS = 4
OWN = "tests.experiments.own"


@dataclass(frozen=True)
class Places:
    """Where a model's values pass: as pictures, in a row of image places, in a row of words, by head."""

    model: str
    pictures: Sequence[str]
    image: Sequence[str]
    words: Sequence[str]
    heads: Sequence[str]
    layers: Sequence[str]
    own: str | None


_UNET = "unet.mid_block.attentions.0.transformer_blocks.0"
_MMDIT = "transformer.transformer_blocks"
PLACES = {
    "shapes-unet": Places(
        "shapes-unet",
        ("unet.mid_block", "unet.up_blocks.0.resnets.0", "latents", "noise_pred", "unet.up_blocks.1:input"),
        (_UNET, f"{_UNET}.attn1.to_v", f"{_UNET}.ff"),
        (f"{_UNET}.attn2.to_k", f"{_UNET}.attn2.to_v", "unet:inputs[1].encoder_hidden_states"),
        (f"{_UNET}.attn1:heads", f"{_UNET}.attn2:query", f"{_UNET}.attn2:heads"),
        (f"{_UNET}.attn2", "*attn2"),
        f"{_UNET}.attn1",
    ),
    "shapes-mmdit": Places(
        "shapes-mmdit",
        ("latents", "noise_pred", "transformer:input"),
        (f"{_MMDIT}.2:output[1]", f"{_MMDIT}.1.ff", f"{_MMDIT}.3.attn.to_v"),
        (f"{_MMDIT}.2:output[0]", f"{_MMDIT}.1.attn.add_v_proj", "transformer.context_embedder"),
        (f"{_MMDIT}.1.attn:heads", f"{_MMDIT}.2.attn:query", f"{_MMDIT}.3.attn:key"),
        (f"{_MMDIT}.2.attn", "*attn"),
        None,
    ),
}

_OURS = ("num_inference_steps", "guidance_scale")

SHIPPED = tuple(name for name in PLACES if name in zoo.models())

PROMPTS = ("a red circle", "a green square", "a blue triangle", "a yellow circle")


def experiment(number: int) -> Experiment:
    """Return the experiment of a number: its kind and model go round, all else is drawn."""
    drawn = random.Random(number)
    places = PLACES[SHIPPED[number // len(KINDS) % len(SHIPPED)]]
    source, target = drawn.sample(PROMPTS, 2)
    kind = list(KINDS)[number % len(KINDS)]
    given = (target, source) if kind in ("patch", "fork") else (target,)
    made = KINDS[kind](drawn, places, *given)
    more: dict[str, Any] = {}
    if kind == "fork":
        more = {"forks": made["forks"]}
        made = made["interventions"]
    elif drawn.random() < 0.5 and kind not in ("turn", "inject"):
        more = {"source_from": 1}
    return Experiment(
        model=places.model,
        source=source,
        target=target,
        seed=drawn.randrange(1000),
        num_inference_steps=STEPS,
        guidance_scale=drawn.choice((1.0, 3.0)),
        arguments={name: value for name, value in zoo.settings(places.model).items() if name not in _OURS},
        interventions=made,
        **more,
    )


def _when(drawn: random.Random, *, attention: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if drawn.random() < 0.7:
        found["steps"] = sorted(drawn.sample(range(1, STEPS), drawn.randint(1, STEPS - 1)))
    if drawn.random() < 0.5 and not attention:
        found["branch"] = "cond"
    if drawn.random() < 0.3:
        found["strength"] = drawn.choice((0.5, 1.5))
    if drawn.random() < 0.3:
        found["mask"] = [[drawn.random() for _ in range(4)] for _ in range(4)]
    return found


def _where(drawn: random.Random, places: Places, target: str) -> dict[str, Any]:
    found = _when(drawn)
    chosen = drawn.choice(("pictures", "image", "words", "heads"))
    found["site"] = drawn.choice(getattr(places, chosen))
    if found["site"] in ("latents", "noise_pred"):
        found.pop("branch", None)
    if chosen == "words":
        found.pop("mask", None)
        found["words"] = [drawn.choice(target.split()[1:])]
    elif chosen == "image" and drawn.random() < 0.4:
        found.pop("mask", None)
        found["tokens"] = sorted(drawn.sample(range(16), 3))
    elif chosen == "heads":
        found["heads"] = [drawn.randrange(2)]
        if ":key" in found["site"] or ":query" in found["site"]:
            found.pop("mask", None)
    return found


def _patch(drawn: random.Random, places: Places, target: str, source: str) -> list[dict[str, Any]]:
    found = {"kind": "patch", **_where(drawn, places, target)}
    if "words" in found:
        # The text encoder reads forwards, so that only the last word is told apart in every pair of prompts.
        found |= {"words": target.split()[-1:], "from_words": source.split()[-1:]}
    if drawn.random() < 0.4:
        found["from_step"] = drawn.choice((0, 2))
    return [found]


def _ablate(how: str) -> Callable[..., list[dict[str, Any]]]:
    def made(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
        found = {"kind": "ablate", "how": how, "seed": drawn.randrange(9), **_where(drawn, places, target)}
        if how in ("mean", "resample"):
            found["references"] = drawn.sample([each for each in PROMPTS if each != target], 2)
        if "references" in found and "words" in found:
            # What is taken at words is there in every reference, and is another: the text is read forwards.
            _, colour, shape = target.split()
            others = [each for each in ("red", "green", "blue", "purple") if each != colour]
            found |= {"words": [shape], "references": [f"a {each} {shape}" for each in others[:2]]}
        return [found]

    return made


def _scale(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    return [{"kind": "scale", "factor": drawn.choice((0.0, 0.5, 2.0)), **_where(drawn, places, target)}]


def _steer(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    pairs = [("a red circle", "a blue circle"), ("a red square", "a blue square")]
    return [
        {
            "kind": "steer",
            "pairs": pairs,
            "method": drawn.choice(("mean", "pca")),
            **_where(drawn, places, target),
        }
    ]


def _corrupt(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    return [{"kind": "corrupt", "seed": drawn.randrange(9), **_where(drawn, places, target)}]


def _replace(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    return [{"kind": "replace", "value": [drawn.choice((0.1, -0.5))], **_where(drawn, places, target)}]


def _direction(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    return [{"kind": "steer", "direction": [drawn.choice((-2.0, 0.7))], **_where(drawn, places, target)}]


def _module(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    here = {"kind": "module", **_where(drawn, places, target)}
    if drawn.random() < 0.5:
        return [{**here, "module": f"{OWN}:Halving", "arguments": {"share": 0.25}}]
    change = drawn.choice(({"to": 3.0}, {"times": 0.0}))
    return [{**here, "module": f"{OWN}:Pairs", "arguments": {}, "feature": 2, **change}]


def _layer(drawn: random.Random, places: Places) -> dict[str, Any]:
    found = {**_when(drawn, attention=True), "site": drawn.choice(places.layers)}
    return {**found, "heads": [1]} if drawn.random() < 0.3 else found


def _reweight(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    words = {word: drawn.choice((0.0, 2.0, 3.0)) for word in target.split()[1:]}
    return [{"kind": "reweight", "words": words, **_layer(drawn, places)}]


def _inject(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    found = {"kind": "inject", **_layer(drawn, places), "site": places.layers[0]}
    if places.own is not None and drawn.random() < 0.5:
        found |= {"site": places.own, "block": "image->image"}
    return [found]


def _force(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    picture = [[drawn.random() / 2 for _ in range(8)] for _ in range(8)]
    return [{"kind": "force_map", "word": target.split()[-1], "map": picture, **_layer(drawn, places)}]


def _turn(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    later = drawn.choice(PROMPTS)
    turns = [
        {"kind": "turn", "step": 1, "guidance_scale": 5.0},
        {"kind": "turn", "step": 3, "prompt": later},
    ]
    first = drawn.choice(
        (
            {"kind": "scale", "site": "latents", "factor": 0.9, "steps": [0, 3]},
            {"kind": "reweight", "words": {later.split()[-1]: 3.0}, "steps": [3], "site": places.layers[1]},
            {"kind": "patch", "site": places.image[0], "branch": "cond"},
        )
    )
    return [first, *turns]


def _initial_noise(drawn: random.Random, places: Places, target: str) -> list[dict[str, Any]]:
    noise: dict[str, Any] = {"seed": 1000 + drawn.randrange(9)}
    if drawn.random() < 0.3:
        values = [[[drawn.gauss(0, 1) for _ in range(16)] for _ in range(16)] for _ in range(4)]
        noise = {"value": values}
    if drawn.random() < 0.5:
        noise["mask"] = [[drawn.random() for _ in range(4)] for _ in range(4)]
    return [{"kind": "turn", "step": 0, "noise": {**noise, "strength": drawn.choice((0.5, 1.0))}}]


def _fork(drawn: random.Random, places: Places, target: str, source: str) -> dict[str, Any]:
    (scale,) = _scale(drawn, places, PROMPTS[3])
    leaf = {"step": 3, "prompt": PROMPTS[3], "interventions": [{**scale, "steps": [3]}]}
    reweight = {**_reweight(drawn, places, target)[0], "words": {"a": 3.0}, "steps": [2]}
    first = {"step": 2, "interventions": [reweight], "forks": [leaf]}
    patches = _patch(drawn, places, target, source)
    if patches[0]["site"] not in ("latents", "noise_pred"):
        patches[0]["branch"] = "cond"  # a source without guidance has no other, and the second branch has
    return {
        "interventions": patches,
        "forks": [first, {"step": 1, "guidance_scale": 4.0}],
    }


KINDS: dict[str, Callable[..., Any]] = {
    "patch": _patch,
    "zero": _ablate("zero"),
    "reweight": _reweight,
    "steer": _steer,
    "inject": _inject,
    "module": _module,
    "force_map": _force,
    "turn": _turn,
    "scale": _scale,
    "mean": _ablate("mean"),
    "fork": _fork,
    "noise": _ablate("noise"),
    "resample": _ablate("resample"),
    "corrupt": _corrupt,
    "direction": _direction,
    "replace": _replace,
    "initial_noise": _initial_noise,
}
"""What an experiment is about: each kind of intervention, each way to ablate and to steer, and a tree of
branches."""

assert set(by_kind()) <= {*KINDS, "ablate"}
