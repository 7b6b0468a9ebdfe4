"""The report's page as HTML: numbers as people read them, tables, figures. Every text that comes from data is escaped here.

The figures' JSON stands in the page as it is; page.html has the look and the script that draws them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from cift_strategies.charts import Figure

DASH: Final = "\u2013"


def number(value: Any, digits: int = 2, unit: str = "", sign: bool = False) -> str:
    """Thousands apart, `digits` decimals; a dash for None and NaN."""
    if value is None or not math.isfinite(float(value)):
        return DASH
    v = round(float(value), digits) + 0.0
    return f"{v:{'+' if sign and v else ''},.{digits}f} {unit}".rstrip()


def money(value: Any, currency: str, sign: bool = False, digits: int = 2) -> str:
    """An amount; where a run has several currencies, a mapping of them, one after the other."""
    if isinstance(value, Mapping):
        return ", ".join(number(v, digits, str(k), sign) for k, v in value.items())
    return number(value, digits, currency, sign)


def count(value: Any) -> str:
    return number(value, 0)


def percent(value: Any, digits: int = 1) -> str:
    return number(None if value is None else 100 * float(value), digits, "%")


def small(value: Any, unit: str = "") -> str:
    """Three figures, whatever the size."""
    if value is None or not math.isfinite(float(value)):
        return DASH
    v = float(value)
    return number(v, min(7, 0 if v == 0 else max(0, 2 - math.floor(math.log10(abs(v))))), unit)


def probability(value: float) -> str:
    return DASH if not math.isfinite(value) else "> 0.999" if value > 0.9995 else "< 0.001" if value < 0.0005 else f"{value:.3f}"


def real(value: Any) -> float:
    """NaN for None."""
    return float("nan") if value is None else float(value)


def words(name: Any) -> str:
    return str(name).replace("_", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], lead: Iterable[int] = (), kind: str = "") -> str:
    """An HTML table of plain texts; rows numbered in `lead` stand out."""
    bold = set(lead)
    top = "<thead><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr></thead>" if head else ""
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(str(c))}</td>" for c in row)
        lines.append(f"<tr{' class=lead' if i in bold else ''}>{cells}</tr>")
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(lines)}</tbody></table></div>' if lines else ""


def side_by_side(*parts: str) -> str:
    return '<div class="two">' + "".join(f"<div>{p}</div>" for p in parts) + "</div>"


def exact(key: str, value: Any, shown: str) -> str:
    """A figure of summary.json as shown, with its exact value beside it for machines."""
    return f'<data data-key="{key}" value="{escape("" if value is None else repr(value), quote=True)}">{escape(shown)}</data>'


class Page:
    """Collects the HTML of the sections and the JSON of their figures."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.files: dict[str, str] = {}  # further files of the folder
        self._figures = 0

    def add(self, html: str) -> None:
        self.parts.append(html)

    def keep(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """The figures of a table as they are, for `statistics.json` and `statistics.parquet`."""
        self.tables[name] = [dict(r) for r in rows]

    def section(self, anchor: str, head: tuple[str, str, str], *content: str) -> None:
        """`head`: the link in the page's contents, the title, and what the reader looks at."""
        link, title, note = head
        self.links.append((anchor, link))
        inner = "\n".join(content)
        self.add(f'<section id="{anchor}"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>\n{inner}</section>')

    def figure(self, fig: Figure | None, label: str, absent: str = "", dark: Figure | None = None, wide: bool = False) -> str:
        """A chart, or, where there is none, a box that says why. `dark`: drawn in its place on a dark page."""
        if fig is None:
            return f'<div class="empty">{escape(absent)}</div>'
        more = f' data-dark="{self._data(dark)}"' if dark else ""
        style = f"height:{int(fig['layout'].get('height', 300))}px"
        name, kind = escape(label, quote=True), "chart wide" if wide else "chart"
        return f'<div class="{kind}" role="img" aria-label="{name}" style="{style}" data-figure="{self._data(fig)}"{more}></div>'

    def choice(self, group: str, label: str, panels: Mapping[str, str]) -> str:
        """Panels of which one is seen at a time, and what chooses it."""
        shown = "".join(f'<div data-in="{group}" data-at="{k}"{" hidden" if k else ""}>{p}</div>' for k, p in enumerate(panels.values()))
        options = "".join(f'<option value="{k}">{escape(name)}</option>' for k, name in enumerate(panels))
        select = f'<select data-group="{group}" aria-label="{escape(label, quote=True)}">{options}</select>' if len(panels) > 1 else ""
        return select + shown

    def _data(self, fig: Mapping[str, Any]) -> str:
        self._figures += 1
        text = json.dumps(fig, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        self.add(f'<script type="application/json" id="f{self._figures}">{text}</script>')
        return f"f{self._figures}"
