"""Pieces of the HTML that stands in for a widget where no kernel and no script runs.

Escaping happens here and nowhere else.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_FIGURE = "display:inline-block;margin:0 8px 8px 0;vertical-align:top;font:12px system-ui,sans-serif"
_CELL = "text-align:left;padding:2px 12px 2px 0"


def text(value: object) -> str:
    """Escapes a value for HTML text and attributes."""
    return html.escape(str(value), quote=True)


def image(png: bytes, label: str, *, width: int = 128) -> str:
    """An `<img>` that carries its bytes."""
    data = base64.b64encode(png).decode("ascii")
    style = "display:block;image-rendering:pixelated"
    return f'<img src="data:image/png;base64,{data}" alt="{text(label)}" width="{width}" style="{style}">'


def figure(label: str, png: bytes | None, caption: str = "") -> str:
    """A labelled image, or its label alone where there is no image."""
    below = f"<div>{text(caption)}</div>" if caption else ""
    shown = image(png, label) if png else "<div>not yet</div>"
    return f'<figure style="{_FIGURE}"><figcaption>{text(label)}</figcaption>{shown}{below}</figure>'


def table(rows: Iterable[Sequence[object]]) -> str:
    """A plain table; the first column is its heading."""
    made = "".join(
        f'<tr><th style="{_CELL}">{text(first)}</th>'
        + "".join(f'<td style="{_CELL}">{text(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table>{made}</table>"


def code(source: str) -> str:
    """A block of code."""
    return f"<pre><code>{text(source)}</code></pre>"
