"""Tables as notebooks show them."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = "text-align: left; padding: 0.2em 1em 0.2em 0"


def html(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A table of text, whose first column names what is in the others."""
    lines = (_cell("th", name) + "".join(_cell("td", text) for text in texts) for name, *texts in rows)
    return f"<b>{escape(title)}</b><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="{STYLE}">{escape(text)}</{tag}>'
