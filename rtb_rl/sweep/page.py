"""The report as one HTML page that needs nothing beside itself: no script, no network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rtb_rl.sweep.figures import INK, Drawn
from rtb_rl.sweep.tables import Cell, Table

POINT_IN_PIXELS = 4 / 3
READABLE = 0.8
"""A figure is shrunk to this share of its size; on a narrower screen it scrolls in its box."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff;
  --line: #d0d7de; --band: #f6f8fa; --link: #0b62b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9da7b1; --paper: #14171b;
  --line: #3a414a; --band: #1d2127; --link: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1220px; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
a { color: var(--link); }
.headline { font-size: 1.15rem; max-width: 46rem; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0;
  margin: 1rem 0 0; }
p.remark, figcaption { color: var(--soft); font-size: .875rem; max-width: 50rem; margin: .5rem 0;
  overflow-wrap: anywhere; }
.box { overflow: auto; max-height: 44rem; border: 1px solid var(--line); border-radius: 6px; }
figure .box { max-height: none; padding: .5rem; }
.box:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { padding: .35rem .6rem; text-align: left; white-space: nowrap; vertical-align: top; }
td.wide { white-space: normal; min-width: 14rem; }
thead th { background: var(--band); position: sticky; top: 0; z-index: 1; }
th small, td small { display: block; color: var(--soft); font-size: .75rem; }
tbody tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: normal; position: sticky; left: 0; background: var(--paper); }
thead th:first-child { left: 0; z-index: 2; }
tbody th { overflow-wrap: anywhere; }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 7.5rem; } }
.figures { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: start; }
figure { margin: 0 0 1.5rem; max-width: 100%; width: min-content; }
figure.grid { width: fit-content; }
figure > h3, figcaption { contain: inline-size; }
svg { display: block; max-width: 100%; height: auto; }
""".strip()

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the page: its title, remarks, tables and figures, in this order."""

    name: str
    title: str
    remarks: Sequence[str] = ()
    tables: Sequence[Table] = field(default_factory=list)
    figures: Sequence[Drawn] = field(default_factory=list)


def page(title: str, headline: str, sections: Sequence[Section]) -> str:
    """The whole page; every text is escaped, so rows may hold any."""
    links = "".join(
        f'<li><a href="#{escape(part.name)}">{escape(part.title)}</a></li>' for part in sections
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>",
            f"<header><h1>{escape(title)}</h1>",
            f'<p class="headline">{escape(headline)}</p></header>',
            f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>',
            *map(_section, sections),
            "</main>\n</body>\n</html>\n",
        ]
    )


def inlined(svg: str, name: str, label: str) -> str:
    """An SVG file as an element of a page: in the page's ink, its ids apart from other figures'."""
    svg = svg[svg.index("<svg") :]
    tag, rest = svg.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', tag)
    if size is None:
        raise ValueError(f"figure {name} has no viewBox")
    width = POINT_IN_PIXELS * float(size[1])
    style = f"width: {width:.0f}px; min-width: {READABLE * width:.0f}px"
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = rest.replace(INK, "currentColor")
    return (
        f'<svg viewBox="{size[0][9:-1]}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'role="img" aria-label="{escape(label)}" style="{style}">{rest.rstrip()}'
    )


def _section(section: Section) -> str:
    single = len(section.tables) == 1 and not section.figures
    return "\n".join(
        [
            f'<section id="{escape(section.name)}">\n<h2>{escape(section.title)}</h2>',
            *(_table(table, titled=not single) for table in section.tables),
            '<div class="figures">' if section.figures else "",
            *map(_figure, section.figures),
            "</div>" if section.figures else "",
            *map(_remark, section.remarks),
            "</section>",
        ]
    )


def _table(table: Table, *, titled: bool) -> str:
    by_task = tuple(table.header[:2]) == ("task", "agent")  # one name of a line stays in view
    header = ["agent, task", *table.header[2:]] if by_task else table.header
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    lines = []
    for first, *rest in table.rows:
        if by_task:
            first, rest = Cell(rest[0].text, interval=first.text), rest[1:]
        cells = "".join(map(_cell, rest))
        lines.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    return "\n".join(
        [
            f"<h3>{escape(table.title)}</h3>" if titled else "",
            f'<div class="box" tabindex="0" role="region" aria-label="{escape(table.title)}">',
            f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>",
            *map(_remark, table.remarks),
        ]
    )


def _cell(cell: Cell) -> str:
    kind = ' class="wide"' if len(cell.text) > 40 else ""
    return f"<td{kind}>{_text(cell)}</td>"


def _text(cell: Cell) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.strong else escape(cell.text)
    return f"{text}<small>{escape(cell.interval)}</small>" if cell.interval else text


def _figure(drawn: Drawn) -> str:
    svg = inlined(drawn.svg.read_text(encoding="utf-8"), drawn.name, drawn.title)
    kind = ' class="grid"' if drawn.panels > 1 else ""
    return "\n".join(
        [
            f"<figure{kind}>\n<h3>{escape(drawn.title)}</h3>",
            f'<div class="box" tabindex="0" role="region" aria-label="{escape(drawn.title)}">',
            f"{svg}</div>\n<figcaption>{escape(drawn.caption)}</figcaption>\n</figure>",
        ]
    )


def _remark(text: str) -> str:
    return f'<p class="remark">{escape(text)}</p>'
