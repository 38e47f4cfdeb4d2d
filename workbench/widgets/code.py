"""The code of what is on screen."""

from __future__ import annotations

from typing import ClassVar, Literal

import traitlets as t

from workbench.widgets.element import Element, Message
from workbench.widgets.static_html import code


class Export(Message):
    """Export in a format."""

    kind: Literal["export"]
    format: str


class CodeView(Element):
    """Python code with line numbers, to copy or export.

    Attributes:
        code: the source.
        filename: shown beside the title.
        status: what the last export did.
        formats: what it can be exported as; none hides the button.
    """

    _bundle: ClassVar[str] = "code"
    _messages: ClassVar = {"export": Export}
    _page_width: ClassVar[str] = "minmax(0, 2fr)"

    code = t.Unicode("").tag(sync=True)
    filename = t.Unicode("").tag(sync=True)
    status = t.Unicode("").tag(sync=True)
    formats = t.List(t.Unicode()).tag(sync=True)

    def _refusal(self, message: Message) -> str:
        if isinstance(message, Export) and message.format not in self.formats:
            return f"no format {message.format!r}"
        return ""

    def __repr__(self) -> str:
        return f"CodeView({self.filename or 'untitled'}, {len(self.code.splitlines())} lines)"

    def fallback_html(self) -> str:
        """The code as text."""
        return code(self.code)
