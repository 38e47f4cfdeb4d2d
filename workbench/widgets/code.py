"""The code of what is on screen."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import traitlets as t
from pydantic import Field

from workbench.experiments.spec import LARGEST
from workbench.widgets.element import Element, Message
from workbench.widgets.static_html import code


class Export(Message):
    """Export in a format."""

    kind: Literal["export"]
    format: str


class Open(Message):
    """Open a file that the browser has read."""

    kind: Literal["open"]
    name: Annotated[str, Field(max_length=255)]
    text: Annotated[str, Field(max_length=LARGEST)]


class CodeView(Element):
    """Python code with line numbers, to copy or export.

    Attributes:
        code: the source.
        filename: shown beside the title.
        status: what the last export did.
        formats: what it can be exported as; none hides the button.
        can_open: whether a file can be opened here.
    """

    _bundle: ClassVar[str] = "code"
    _messages: ClassVar = {"export": Export, "open": Open}
    _page_width: ClassVar[str] = "minmax(0, 2fr)"

    code = t.Unicode("").tag(sync=True)
    filename = t.Unicode("").tag(sync=True)
    status = t.Unicode("").tag(sync=True)
    formats = t.List(t.Unicode()).tag(sync=True)
    can_open = t.Bool(False).tag(sync=True)

    def _refusal(self, message: Message) -> str:
        if isinstance(message, Export) and message.format not in self.formats:
            return f"no format {message.format!r}"
        return "" if isinstance(message, Export) or self.can_open else "nothing is opened here"

    def __repr__(self) -> str:
        return f"CodeView({self.filename or 'untitled'}, {len(self.code.splitlines())} lines)"

    def fallback_html(self) -> str:
        """The code as text."""
        return code(self.code)
