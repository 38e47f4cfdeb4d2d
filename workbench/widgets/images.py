"""The strip of images."""

from __future__ import annotations

from typing import ClassVar

import traitlets as t

from workbench.widgets.element import Element
from workbench.widgets.static_html import figure, text


class ImageStrip(Element):
    """Images side by side, pixel for pixel; a click enlarges one.

    Attributes:
        cards: ``{label, png: bytes or None, caption, badge}`` each.
        note: one line below them, for example a difference beside its noise floor.
    """

    _bundle: ClassVar[str] = "images"
    _page_width: ClassVar[str] = "minmax(0, 264px)"

    cards = t.List(t.Dict()).tag(sync=True)
    note = t.Unicode("").tag(sync=True)

    def __repr__(self) -> str:
        return f"ImageStrip({', '.join(str(card.get('label')) for card in self.cards)})"

    def fallback_html(self) -> str:
        """The images, with their labels and captions."""
        made = (
            figure(str(c.get("label", "")), c.get("png"), str(c.get("caption") or "")) for c in self.cards
        )
        return f"<div>{''.join(made)}<p>{text(self.note)}</p></div>"
