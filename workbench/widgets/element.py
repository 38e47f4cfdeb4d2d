"""The base of every widget: its bundle, what the browser may say, what a saved notebook shows.

The browser is not trusted. A message is validated against the widget's schema and otherwise refused;
a trait changes from the browser only where the class names it in ``_editable``.
"""

from __future__ import annotations

import functools
import html
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import anywidget
import traitlets as t
from pydantic import BaseModel, ConfigDict, ValidationError

from workbench.errors import InputError, LoadError, UnknownNameError, nearest

STATIC = Path(__file__).parent / "static"

_FROM_LAYOUT = frozenset({"layout", "tabbable", "tooltip"})
_REJECTED_KEPT = 50


class Message(BaseModel):
    """What a front end may send; subclasses name their ``kind`` as a literal."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


AnyMessage = TypeVar("AnyMessage", bound=Message)
Handler = Callable[[Any], None]


@dataclass(frozen=True)
class Rejected:
    """Something the browser sent that was not obeyed, and why."""

    content: object
    reason: str


@functools.cache
def bundle_text(name: str) -> str:
    """The JavaScript of a bundle, as text: a path would keep every widget alive for ever.

    Raises:
        LoadError: the bundle has not been built.
    """
    path = STATIC / f"{name}.js"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LoadError(
            f"The front end of the widgets is not built: {path.name} is missing from {STATIC}. "
            "Run `make setup` in the repository, or install a wheel."
        ) from None


class Element(anywidget.AnyWidget):
    """A widget of the workbench.

    Subclasses set ``_bundle`` (the name of the built module), ``_messages`` (kind to schema) and
    ``_editable`` (the traits that the browser may change).
    """

    _bundle: ClassVar[str] = ""
    _messages: ClassVar[Mapping[str, type[Message]]] = {}
    _editable: ClassVar[frozenset[str]] = frozenset()
    _page_width: ClassVar[str] = "minmax(0, 1fr)"

    _esm = t.Unicode().tag(sync=True)
    working = t.Bool(False, help="Show that something is going on.").tag(sync=True)
    problem = t.Unicode("", help="An error to show in the widget; empty for none.").tag(sync=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Only a developer wants reloading: it watches the file from a thread that keeps the widget alive.
        if os.environ.get("WORKBENCH_DEV") and "_bundle" in cls.__dict__:
            os.environ.setdefault("ANYWIDGET_HMR", "1")
            cls._esm = STATIC / f"{cls._bundle}.js"
        super().__init_subclass__(**kwargs)

    def __init__(self, **kwargs: Any) -> None:
        self.rejected: deque[Rejected] = deque(maxlen=_REJECTED_KEPT)
        self._handlers: dict[str, list[Handler]] = {}
        known = self._arguments()
        for name in kwargs:
            if name not in known:
                raise InputError(f"{type(self).__name__} takes no argument {name!r}.{nearest(name, known)}")
        try:
            super().__init__(**kwargs)
        except t.TraitError as error:
            raise InputError(f"{type(self).__name__}: {error}") from error
        self.on_msg(type(self)._receive)

    @t.default("_esm")  # type: ignore[untyped-decorator]
    def _read_bundle(self) -> str:
        return bundle_text(self._bundle)

    @classmethod
    def _arguments(cls) -> list[str]:
        """The traits a caller may give: the widget's own and those of layout."""
        own = [name for name in cls.class_trait_names(sync=True) if not name.startswith("_")]
        return sorted(name for name in own if name in _FROM_LAYOUT or not hasattr(anywidget.AnyWidget, name))

    def on(self, kind: str, handler: Callable[[AnyMessage], None]) -> None:
        """Calls ``handler`` with each valid message of a kind.

        It may be called from the main thread or another: let it only enqueue or set an event.

        Args:
            kind: what the message is, for example ``"run"``.
            handler: gets the validated message.

        Raises:
            UnknownNameError: this widget sends no such kind.
        """
        if kind not in self._messages:
            name = type(self).__name__
            raise UnknownNameError(f"{name} sends no message {kind!r}.{nearest(kind, self._messages)}")
        self._handlers.setdefault(kind, []).append(handler)

    def _receive(self, content: object, _buffers: object = None) -> None:
        """Validates a message from the browser and passes it on, or keeps why not."""
        kind = content.get("kind") if isinstance(content, dict) else None
        schema = self._messages.get(kind) if isinstance(kind, str) else None
        if schema is None:
            self.rejected.append(Rejected(content, f"unknown kind {kind!r}"))
            return
        try:
            message = schema.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            self.rejected.append(Rejected(content, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
            return
        reason = self._refusal(message)
        if reason:
            self.rejected.append(Rejected(content, reason))
            return
        for handler in list(self._handlers.get(message_kind(message), [])):
            handler(message)

    def _refusal(self, message: Message) -> str:  # noqa: ARG002
        """Why a well-formed message does not fit what the widget shows now; empty if it does."""
        return ""

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes trait changes from the browser: only editable ones, only values that fit."""
        taken = {}
        for name, value in sync_data.items():
            if name in self._editable or name == "_view_count":
                taken[name] = value
            else:
                self.rejected.append(Rejected({name: value}, f"{name!r} is not for the browser to change"))
        for name, value in taken.items():
            try:
                super().set_state({name: value})
            except (t.TraitError, ValueError, TypeError) as error:
                self.rejected.append(Rejected({name: value}, str(error)))

    def fallback_html(self) -> str:
        """HTML that stands in for the widget where nothing runs; every text in it is escaped."""
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _fallback(self) -> dict[str, object]:
        return {"text/html": self.fallback_html()}

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        made = super()._repr_mimebundle_(**kwargs)
        if made is None:
            return None
        data, metadata = made
        return {**data, **self._fallback()}, metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def message_kind(message: Message) -> str:
    """The kind of a message."""
    kind: str = message.kind  # type: ignore[attr-defined]
    return kind
