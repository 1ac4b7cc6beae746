"""A page of sections in the report's style, for what needs no template of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from omega_qvla.files import write_text


def write_simple_page(
    path: Path, eyebrow: str, title: str, sections: Iterable[tuple[str, str]]
) -> Path:
    """Write one HTML file without an outside reference, atomically.

    sections: (heading, HTML) each.
    """
    style = (resources.files("omega_qvla.evaluation.report") / "style.css").read_text("utf-8")
    body = "".join(
        f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections
    )
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main><header>"
        f'<p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(title)}</h1></header>'
        f"{body}</main></body></html>\n"
    )
    write_text(path, text)
    return path


def html_list(items: Iterable[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
