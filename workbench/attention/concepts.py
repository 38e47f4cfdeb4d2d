"""ConceptAttention: maps of concepts that need not be in the prompt, in the space that attention puts out.

Helbling et al., 2025 (arXiv:2502.04320). A concept goes through the joint blocks beside the prompt: it looks
at itself, the other concepts and the image, and nothing looks at it, so that the run stays as it is. Where an
image place's attention output points along a concept's, the concept is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from workbench.attention.geometry import IMAGE_TO_TEXT, Scope, by_name
from workbench.attention.maps import AttentionMaps
from workbench.attention.request import add_maps
from workbench.attention.tap import LOOK, Handed
from workbench.attention.watch import Watch
from workbench.attention.words import Word, find
from workbench.errors import GuardError, InputError
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.sites import modules
from workbench.tracing.steps import Steps, covers, normal


@dataclass
class ConceptAttention:
    """Asks a run for maps of concepts; give it in ``capture``, see `DiffusionModel.concepts`.

    The maps are then ``record.attention``, an `AttentionMaps` with the concepts as its words: each place's
    shares of the concepts, which sum to 1.

    Attributes:
        names: the concepts.
        values: by cross-attention layer, what each concept's own value is, ``(concepts, heads * head_dim)``.
        tokens: by joint block, the concepts as the first of them is given its text, ``(concepts, width)``.
        steps: which steps; None is every step.
        branch: which guidance branch.
        sample: of which of the run's samples.
    """

    names: tuple[str, ...]
    values: Mapping[str, torch.Tensor] = field(repr=False)
    tokens: Mapping[str, torch.Tensor] = field(repr=False)
    steps: Steps = None
    branch: str = "cond"
    sample: int = 0
    _runs: dict[int, _Run] = field(default_factory=dict, init=False, repr=False, compare=False)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the attention layers of a run."""
        self._runs[id(session.record)] = _Run(self, session)
        try:
            yield
        except Exception:
            del self._runs[id(session.record)]
            raise

    def deliver(self, record: Record) -> None:
        """Put the maps into the record."""
        run = self._runs.pop(id(record), None)
        if run is not None:
            add_maps(record, run.maps())


class _Run:
    """One run's concepts."""

    def __init__(self, asked: ConceptAttention, session: Session) -> None:
        self.asked = asked
        self.session = session
        self.steps = normal(asked.steps)
        self.rows: dict[int, Row] = {}
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.layer_rows: dict[str, list[Row]] = {}
        self.image: torch.Tensor | None = None
        self.concepts: torch.Tensor | None = None
        self.stream: torch.Tensor | None = None
        self.beside = False
        known = modules(session.system.denoisers)
        for path, values in asked.values.items():
            self._watch_cross(path, known[path], values)
        blocks = joint_blocks(known)
        if asked.tokens and session.edits:
            raise GuardError(
                "Concepts go through joint blocks a second time, where interventions would act on them as "
                "well. Take them from a run without interventions."
            )
        for path, block in blocks.items() if asked.tokens else ():
            self._watch_joint(path, block)
        self.expected = [*asked.values, *(f"{path}.attn" for path in (blocks if asked.tokens else ()))]

    def maps(self) -> AttentionMaps:
        """Return what was kept.

        Raises:
            GuardError: a layer was never called in a way from which concepts can be read.
        """
        missing = [path for path in self.expected if path not in self.kept]
        if self.kept and missing:
            raise GuardError(f"Concepts were not read in {missing[0]}: it is not called as joint blocks are.")
        words = [Word(name, (index,)) for index, name in enumerate(self.asked.names)]
        layers = {path: torch.stack(found) for path, found in self.kept.items()}
        return AttentionMaps(layers, list(self.rows.values()), words, self.layer_rows)

    def _wanted(self) -> Row | None:
        row = self.session.clock.row
        if row is None or self.session.recomputing or self.session.replaying(row):
            return None
        wanted = row.has(self.asked.branch) and covers(self.steps, row, self.session.clock.total_steps)
        return row if wanted else None

    def _one(self, row: Row, size: int) -> slice:
        """Return the sample's row of a batch."""
        rows = row.rows(self.asked.branch, size)
        width = rows.stop - rows.start
        alone = row.samples is None or width % row.samples
        first = rows.start + (0 if alone else row.rows_of([self.asked.sample], width)[0])
        return slice(first, first + 1)

    def _keep(self, path: str, row: Row, image: torch.Tensor, concepts: torch.Tensor) -> None:
        """Keep the shares of the concepts, of ``(places, width)`` and ``(concepts, width)`` outputs."""
        shares = (concepts.float() @ image.float().T).softmax(0)
        self.rows.setdefault(row.call, row)
        self.layer_rows.setdefault(path, []).append(row)
        self.kept.setdefault(path, []).append(shares.cpu())

    def _watch_cross(self, path: str, layer: nn.Module, values: torch.Tensor) -> None:
        def put_out(_: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            row = self._wanted()
            if row is not None:
                image = args[0][self._one(row, args[0].shape[0])][0]
                self._keep(path, row, image, values.to(image.device))

        self.session.rig.before(layer.to_out[0], put_out)  # type: ignore[index, arg-type]

    def _watch_joint(self, path: str, block: nn.Module) -> None:
        rig = self.session.rig
        attention: Any = block.attn
        first = path in self.asked.tokens

        def image_out(_: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if not self.beside:
                self.image = args[0]

        def concepts_out(_: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if self.beside:
                self.concepts = args[0]

        def again(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            row = None if self.beside else self._wanted()
            if row is None or self.image is None:
                return
            one = self._one(row, self.image.shape[0])
            image = self.image[one][0]
            if first:
                self.stream = self.asked.tokens[path][None].to(image.device, image.dtype)
            if self.stream is None:
                return
            self._go_beside(path, module, row, one, by_name(module, args, kwargs))
            if self.concepts is not None:
                self._keep(f"{path}.attn", row, image, self.concepts[0])

        rig.before(attention.to_out[0], image_out)
        rig.before(attention.to_add_out, concepts_out)
        rig.after(block, again)

    def _go_beside(self, path: str, block: nn.Module, row: Row, one: slice, given: dict[str, Any]) -> None:
        """Run the block on the concepts in the text's place; nobody else sees it."""
        assert self.stream is not None
        text, image = given["encoder_hidden_states"], given["hidden_states"]
        batch, lengths, count = image.shape[0], (text.shape[1], image.shape[1]), self.stream.shape[1]
        for name, value in given.items():
            if "mask" in name and value is not None:
                raise GuardError(
                    f"{path} is given {name}, which says what of its text counts; concepts beside that text "
                    "have no place in it. ConceptAttention is not offered for this model."
                )
        asked = {name: _of_one(value, batch, one) for name, value in given.items()}
        rotary = asked.get("image_rotary_emb")
        if rotary is not None:
            asked["image_rotary_emb"] = tuple(_for_concepts(path, each, lengths, count) for each in rotary)
        self.beside, self.concepts = True, None
        try:
            with torch.no_grad(), self.session.again(row), torch._C.DisableTorchFunction():
                made = block.forward(**{**asked, "encoder_hidden_states": self.stream})
        finally:
            self.beside = False
        self.stream = next((each for each in made if each is not None and each.shape[1] == count), None)


@dataclass
class ConceptReader:
    """Reads one concept where a run that has it as its prompt hands it to attention.

    Attributes:
        name: the concept.
        values: by cross-attention layer, its value, ``(heads * head_dim,)``.
        tokens: by the first joint block of each denoiser, its token, ``(width,)``.
    """

    name: str
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the attention layers of a run."""
        watch = Watch(
            session,
            None,
            turn=LOOK,
            wants=lambda scope: scope.may_have(IMAGE_TO_TEXT),
            look=lambda scope, handed, _: self._look(session, watch, scope, handed),
        )
        known = modules(session.system.denoisers)
        firsts: dict[str, str] = {}
        for path in joint_blocks(known):
            firsts.setdefault(path.partition(".")[0], path)
        for path in firsts.values():
            self._watch_first(session, watch, path, known[path])
        yield

    def deliver(self, record: Record) -> None:
        """Nothing: what was read stays here."""

    def _columns(self, watch: Watch, length: int) -> list[int]:
        return list(find(watch.words(length), self.name).columns)

    def _look(self, session: Session, watch: Watch, scope: Scope, handed: Handed) -> None:
        row = session.clock.row
        if row is None or not row.has("cond") or not scope.text or scope.mixed:
            return
        value = handed["value"][row.rows("cond", handed["value"].shape[0])][0]
        words = value[:, self._columns(watch, value.shape[1])]
        self.values[scope.path] = words.mean(1).flatten().detach().clone()

    def _watch_first(self, session: Session, watch: Watch, path: str, block: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            row, text = session.clock.row, by_name(module, args, kwargs).get("encoder_hidden_states")
            if row is not None and row.has("cond") and isinstance(text, torch.Tensor):
                mine = text[row.rows("cond", text.shape[0])][0]
                self.tokens[path] = mine[self._columns(watch, mine.shape[0])].mean(0).detach().clone()

        session.rig.before(block, enter)


def join(readers: Sequence[ConceptReader], **choice: Any) -> ConceptAttention:
    """Return the request for several concepts' maps.

    Raises:
        InputError: the model has neither cross-attention nor joint blocks.
    """
    values = {path: torch.stack([each.values[path] for each in readers]) for path in readers[0].values}
    tokens = {path: torch.stack([each.tokens[path] for each in readers]) for path in readers[0].tokens}
    if not values and not tokens:
        raise InputError("This model attends to no text, so it has no concepts.")
    return ConceptAttention(tuple(each.name for each in readers), values, tokens, **choice)


def joint_blocks(known: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the blocks whose attention projects image and text by themselves and gives both back."""
    return {
        path: module
        for path, module in known.items()
        if isinstance(getattr(getattr(module, "attn", None), "to_add_out", None), nn.Module)
    }


def _of_one(value: Any, batch: int, one: slice) -> Any:
    """Return one row of what is given for the whole batch, and all else as it is."""
    batched = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch
    return value[one] if batched else value


def _for_concepts(path: str, rotary: torch.Tensor, lengths: tuple[int, int], count: int) -> torch.Tensor:
    """Return rotary embeddings for ``count`` concepts, each as the text's first token, and the image.

    Args:
        path: the block's, for the error.
        rotary: of text and image one after the other, or of either, ``(tokens, ...)``.
        lengths: how many tokens text and image have.
        count: how many concepts there are.

    Raises:
        GuardError: it is of something else.
    """
    text, image = lengths
    concepts = rotary[:1].expand(count, *rotary.shape[1:])
    if rotary.shape[0] == text + image:
        return torch.cat([concepts, rotary[text:]])
    if rotary.shape[0] == image != text:
        return rotary
    if rotary.shape[0] == text != image:
        return concepts
    raise GuardError(
        f"{path} is given {rotary.shape[0]} positions for {text} tokens of text and {image} of image: "
        "it is not known where concepts stand. ConceptAttention is not offered for this model."
    )
