"""SVG as matplotlib writes it, without what says nothing: a third of its size."""

from __future__ import annotations

import re

INK = "#1b1f24"
"""The colour of text, which the outermost element of a figure has."""
_GONE = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"<!--.*?-->",
        r"<metadata>.*?</metadata>",
        r"<style type=\"text/css\">.*?</style>",
        r'(?<=<g) id="[^"]*"',
        r" ?font-family: [^;\"]*;",
        r' transform="rotate\(-0 [^"]*"',
        r'<path d="[^"]*" style="fill: none"/>',
        r" ?stroke-line(?:cap|join): (?:square|miter|round);?",
        r"font-size: 10px; ?",
        rf"(?<=\"|;| )(?:fill: {INK})(?=\" x=)",
    )
)
_USES = re.compile(r'(<g(?: clip-path="[^"]*")?)>((?:<use [^>]*/>){2,})')


def view_box(svg: str) -> str:
    """The viewBox of an SVG document."""
    found = re.search(r'viewBox="([0-9. ]+)"', svg)
    assert found is not None, "matplotlib's SVG has a viewBox"
    return found[1]


def smaller(svg: str) -> str:
    """Without comments, names that nothing refers to, digits that nobody sees, and fonts.

    The page's own font takes the place of matplotlib's, which is as wide as any.
    """
    svg = svg[svg.index("<svg") :]
    for gone in _GONE:
        svg = gone.sub("", svg)
    svg = re.sub(r' (d|x|y|points|transform|style)="([^"]*)"', _rounded, svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = _USES.sub(_one_style, svg)
    svg = _unwrapped(svg).replace("<defs></defs>", "").replace("xlink:href", "href")
    return svg.strip()


def _unwrapped(svg: str) -> str:
    """Without groups that say nothing of what is in them."""
    kept: list[str] = []
    said: list[bool] = []
    for part in re.split(r"(<g[^>]*>|</g>)", svg):
        if part == "</g>":
            wanted = said.pop()
        elif part.startswith("<g") and part.endswith("/>"):
            wanted = False
        elif part.startswith("<g"):
            said.append(wanted := part != "<g>")
        else:
            wanted = True
        if wanted:
            kept.append(part)
    return "".join(kept)


def _one_style(match: re.Match[str]) -> str:
    """The markers of a line with the style that they have in common said once."""
    styles = set(re.findall(r' style="([^"]*)"/>', match[2]))
    if len(styles) != 1:
        return match[0]
    uses = re.sub(r' style="[^"]*"/>', "/>", match[2])
    return f'{match[1]} style="{styles.pop()}">{uses}'


def _rounded(match: re.Match[str]) -> str:
    text = re.sub(
        r"(\.[0-9])[0-9]+" if match[1] != "style" else r"(\.[0-9]{2})[0-9]+", r"\1", match[2]
    )
    if match[1] == "d":
        text = re.sub(r"\s*([A-Za-z])\s*", r"\1", text).replace(".0 ", " ")
    text = re.sub(r"([:;]) ", r"\1", text) if match[1] == "style" else " ".join(text.split())
    return f' {match[1]}="{text}"'
