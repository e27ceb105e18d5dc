"""Tables as notebooks show them."""

from collections.abc import Iterable, Sequence
from html import escape

CELL = "text-align: left; padding: 0.2em 1em 0.2em 0"


def html(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A table of text, whose first column names what is in the others."""
    lines = [
        f'<tr><th style="{CELL}">{escape(name)}</th>{"".join(f"""<td style="{CELL}">{escape(text)}</td>""" for text in texts)}</tr>'
        for name, *texts in rows
    ]
    return f"<b>{escape(title)}</b><table>{''.join(lines)}</table>"
