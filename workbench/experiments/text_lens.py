"""What a text encoder's layers, and its padding, say: pictures of them.

The layers: Toker et al. 2024, "Diffusion Lens" (arXiv:2403.05846). The padding: Toker et al. 2025, "Padding
Tone" (arXiv:2501.06751).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from workbench.attention.words import closest
from workbench.errors import InputError, UnknownNameError, nearest
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.session import Listener, Session
from workbench.tracing.structure import Leaf, leaves, put

Change = Callable[[Leaf, torch.Tensor], torch.Tensor]
"""Makes, of a part of what an encoder put out for the prompt, ``(rows, ...)``, another of its shape."""


def lens(
    model: DiffusionModel,
    prompt: str,
    *,
    encoder: str | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> dict[str, Image.Image]:
    """Return the picture that each layer of a text encoder makes.

    For a layer's picture those after it let the text pass as it is, so that its states go through the final
    normalisation, and what else stands behind, to the denoiser. The other encoders of a pipeline, and
    what guidance contrasts the prompt with, stay whole. A pipeline that reads the states before the last
    layer (SDXL) has the same text for the last two, but for what is pooled.

    Args:
        model: what to run.
        prompt: one prompt.
        encoder: which text encoder (``"text_encoder_2"``); None is that with the most layers, of several
            the last.
        layers: after which layers, counted from 1; 0 is the embeddings, negative ones count from the end.
            None is all.
        seed: noise seed of all pictures.
        listener: told how the runs go on.
        **arguments: the pipeline's own.

    Returns:
        By its label the picture: ``"embeddings"``, ``"layer 1"``, … The last layer's is that of a plain run.

    Raises:
        UnknownNameError: the model has no such encoder.
        InputError: no such layer, or no text encoder at all.
    """
    reader = _Reader(model, prompt, encoder, {"seed": seed, "listener": listener, **arguments})
    count = len(reader.layers)
    chosen = range(count + 1) if layers is None else layers
    for layer in chosen:
        if not -count <= layer <= count:
            raise InputError(
                f"{reader.name} has {count} layers; {layer} is none of them (0: its embeddings)."
            )
    whole = reader.read()
    pictures = {}
    for layer in [each if each >= 0 else each + count + 1 for each in chosen]:
        run = whole if layer == count else reader.run(skipped=reader.layers[layer:])
        pictures[f"layer {layer}" if layer else "embeddings"] = run.images[0]
    return pictures


def padding_lens(
    model: DiffusionModel,
    prompt: str,
    *,
    encoder: str | None = None,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> dict[str, Image.Image]:
    """Return what a prompt's words and its padding make, each without the other.

    What is left out is replaced, in what the encoder puts out, by what it makes of the empty prompt in its
    place. Start and end count among the words, and so does what is pooled.

    Args:
        model: what to run.
        prompt: one prompt.
        encoder: which text encoder, as in `lens`.
        seed: noise seed of all pictures.
        listener: told how the runs go on.
        **arguments: the pipeline's own.

    Returns:
        The pictures ``"prompt"``, ``"words alone"``, ``"padding alone"`` and ``"empty prompt"``.

    Raises:
        UnknownNameError: the model has no such encoder.
        InputError: the prompt has no padding there.
    """
    reader = _Reader(model, prompt, encoder, {"seed": seed, "listener": listener, **arguments})
    whole = reader.read()
    padded = _padding(reader.ids, reader.tokenizer)
    if not padded.any():
        raise InputError(f"{reader.name} is given {prompt!r} without padding, so there is none to look at.")
    nothing = reader.nothing()

    def replaced(places: torch.Tensor, pooled: bool, leaf: Leaf, value: torch.Tensor) -> torch.Tensor:
        other = nothing[leaf].to(value.device)
        if value.ndim == 2:
            return other.expand_as(value) if pooled else value
        if value.shape[1:2] != places.shape:
            return value
        return torch.where(places.to(value.device)[:, None], other, value)

    def picture(places: torch.Tensor, *, pooled: bool) -> Image.Image:
        image: Image.Image = reader.run(change=partial(replaced, places, pooled)).images[0]
        return image

    return {
        "prompt": whole.images[0],
        "words alone": picture(padded, pooled=False),
        "padding alone": picture(~padded, pooled=True),
        "empty prompt": picture(torch.ones_like(padded), pooled=True),
    }


class _Reader:
    """A prompt and the text encoder that reads it.

    Attributes:
        name: the encoder's, among the components.
        layers: its layers, in order.
        ids: the prompt's tokens as it is given them, ``(tokens,)``; there after `read`.
    """

    def __init__(
        self, model: DiffusionModel, prompt: str, encoder: str | None, arguments: Mapping[str, Any]
    ) -> None:
        if not isinstance(prompt, str):
            raise InputError(f"Give one prompt, as text, and not {type(prompt).__name__}.")
        model.dispatch()
        found = _encoders(model)
        if not found:
            raise InputError(f"{model!r} has no text encoder with layers, beside a tokenizer.")
        if encoder is not None and encoder not in found:
            raise UnknownNameError(f"The model has no text encoder {encoder!r}.{nearest(encoder, found)}")
        self.name = encoder or max(reversed(found), key=lambda name: len(found[name]))
        self.layers = found[self.name]
        self.tokenizer = model.components[_tokenizer_of(self.name)]
        self.model = model
        self.prompt = prompt
        self.arguments = dict(arguments)
        self.ids = torch.zeros(0, dtype=torch.long)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def read(self) -> Record:
        """Run plainly, and note what the encoder is given of the prompt."""
        heard = _Heard(self.name)
        record = self.model.record(self.prompt, capture=[heard], **self.arguments)
        rows = [row for ids, _ in heard.calls for row in ids]
        if not rows:
            raise InputError(f"{self.name} is given no tokens in a run with these arguments.")
        told = self.arguments.get(_tokenizer_of(self.name).replace("tokenizer", "prompt")) or self.prompt
        self.ids = closest(rows, self.tokenizer, told)
        self._call = next(call for ids, call in heard.calls if bool(_same(ids, self.ids).any()))
        return record

    def nothing(self) -> dict[Leaf, torch.Tensor]:
        """Return what the encoder makes of the empty prompt, by the place in its output, ``(1, ...)``."""
        empty = self.tokenizer("", padding="max_length", max_length=len(self.ids), return_tensors="pt")
        args, kwargs = self._call
        encoder = self.model.components[self.name]
        ids = _ids(args, kwargs)
        assert ids is not None
        device = ids.device
        given = {**kwargs, "input_ids": empty["input_ids"].to(device)}
        if kwargs.get("attention_mask") is not None:
            given["attention_mask"] = empty["attention_mask"].to(device)
        with torch.no_grad():
            output = encoder(*args[1:], **given)
        return {leaf: value for leaf, value in leaves(output) if value.ndim >= 2}

    def run(self, *, skipped: Sequence[nn.Module] = (), change: Change | None = None) -> Record:
        """Run with some layers left out for the prompt, or with a change of what it is made into."""
        edited = _Edited(self.name, self.ids, skipped, change)
        return self.model.record(self.prompt, capture=[edited], **self.arguments)


class _Heard:
    """A probe that notes what an encoder is given, and how it is called with it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]] = []

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the encoder."""
        session.rig.before(session.system.components[self.name], self._hear)
        yield

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record."""

    def _hear(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _ids(args, kwargs)
        if ids is not None:
            self.calls.append((ids.cpu(), (args, kwargs)))


class _Edited:
    """A probe that changes, in the prompt's rows, what an encoder does."""

    def __init__(
        self, name: str, ids: torch.Tensor, skipped: Sequence[nn.Module], change: Change | None
    ) -> None:
        self.name = name
        self.ids = ids
        self.skipped = skipped
        self.change = change
        self._rows: torch.Tensor | None = None

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Stand in the encoder's way."""
        encoder = session.system.components[self.name]
        session.rig.before(encoder, self._enter)
        session.rig.after(encoder, self._leave)
        for layer in self.skipped:
            session.rig.wrap(layer, "forward", self._passing)
        yield

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record."""

    def _enter(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = _ids(args, kwargs)
        rows = None if ids is None else _same(ids.cpu(), self.ids)
        self._rows = rows if rows is not None and bool(rows.any()) else None

    def _leave(self, _: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        rows, self._rows = self._rows, None
        if rows is None or self.change is None:
            return output
        for leaf, value in list(leaves(output)):
            if value.ndim >= 2:
                output = put(output, leaf, _where(rows, self.change(leaf, value), value), site=self.name)
        return output

    def _passing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer that lets the prompt's states pass; what else it returns, it still does."""

        def passed(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._rows is None:
                return output
            given = args[0] if args else kwargs["hidden_states"]
            leaf, value = next(leaves(output))
            return put(output, leaf, _where(self._rows, given, value), site=self.name)

        return passed


def _encoders(model: DiffusionModel) -> dict[str, list[nn.Module]]:
    """Return the layers of each part that a tokenizer belongs to, by its name."""
    found = {}
    for name, part in model.components.items():
        if isinstance(part, nn.Module) and hasattr(
            model.components.get(_tokenizer_of(name)), "convert_ids_to_tokens"
        ):
            stacks = [
                list(each)
                for path, each in part.named_modules()
                if isinstance(each, nn.ModuleList) and "vision" not in path and "visual" not in path
            ]
            if stacks:
                found[name] = max(stacks, key=_size)
    return found


def _size(layers: Sequence[nn.Module]) -> int:
    return sum(each.numel() for layer in layers for each in layer.parameters())


def _tokenizer_of(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer") if "text_encoder" in encoder else ""


def _ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    fits = isinstance(ids, torch.Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    return ids if fits else None


def _same(ids: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return which rows of ids, ``(rows, tokens)``, are the prompt's."""
    if ids.shape[1] != len(prompt):
        return torch.zeros(len(ids), dtype=torch.bool)
    return (ids == prompt).all(1)


def _where(rows: torch.Tensor, new: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), new, value)


def _padding(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Return which of a prompt's tokens pad it, boolean ``(tokens,)``: those at its end, or at its start.

    Where the end of a text and its padding are one token, as in CLIP, the first of them is the end.
    """
    blank = (ids == tokenizer.pad_token_id).long()
    start = int(blank.cumprod(0).sum())
    end = int(blank.flip(0).cumprod(0).sum())
    if end and tokenizer.pad_token_id == tokenizer.eos_token_id:
        end -= 1
    places = torch.arange(len(ids))
    return (places < start) | (places >= len(ids) - end)
