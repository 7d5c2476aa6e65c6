"""A run's plots: PNG files, and one HTML page that holds them all and can be sent to anybody."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text, write_with

DOTS_PER_INCH = 80  # a page of ten plots stays below 5 MB
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
img { max-width: 100% } figure { margin: 1.5em 0 } figcaption { color: #666 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
"""


class Report:
    """Collects text, tables and figures in their order; `write` puts report.html beside the PNG files."""

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self.parts: list[str] = []

    def text(self, words: str) -> None:
        self.parts.append(f"<p>{html.escape(words)}</p>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Numbers are shown with four digits behind the point."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        lines = ("".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) for row in rows)
        self.parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")

    def figure(self, figure: Any, name: str, caption: str) -> Path:
        """Save a matplotlib figure as `name`.png, put it on the page and free it; returns its path."""
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=DOTS_PER_INCH, bbox_inches="tight")
        figure.clear()
        path = self.folder / f"{name}.png"
        write_with(path, lambda file: file.write(stream.getvalue()))
        data = base64.b64encode(stream.getvalue()).decode()
        words = html.escape(caption)
        self.parts.append(
            f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
        )
        return path

    def write(self) -> Path:
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(self.parts)}</body></html>\n"
        )
        path = self.folder / "report.html"
        write_text(path, page)
        return path


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
