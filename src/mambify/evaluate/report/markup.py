"""Building HTML and SVG from parts, escaped by default: text is text unless it is :class:`Html` already."""

from __future__ import annotations

from html import escape

Child = object  # a string or number to escape, Html, None (left out), or a list of these


class Html(str):
    """Markup that has been built, and escaped, by :func:`el`."""

    __slots__ = ()


def join(*children: Child) -> Html:
    """The children one after another: ``Html`` as it is, anything else escaped, None left out."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            parts.append(join(*child))
        else:
            parts.append(child if isinstance(child, Html) else escape(str(child)))
    return Html("".join(parts))


def el(tag: str, /, *children: Child, **attributes: object) -> Html:
    """One element. ``class_`` becomes ``class``, ``_`` becomes ``-``; an attribute of None is left out."""
    pairs = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{''.join(pairs)}>{join(*children)}</{tag}>")


def table(head: list[str], rows: list[list[Child]], *, caption: Child = None, first_is_header: bool = True) -> Html:
    """A data table that scrolls sideways in its own box on a narrow screen."""

    def cells(row: list[Child]) -> Html:
        first = el("th", row[0], scope="row") if first_is_header else el("td", row[0])
        return el("tr", first, *(el("td", cell) for cell in row[1:]))

    body = el(
        "table",
        el("caption", caption) if caption else None,
        el("thead", el("tr", *(el("th", name, scope="col") for name in head))),
        el("tbody", *(cells(row) for row in rows)),
    )
    label = str(caption) if caption and not isinstance(caption, Html) else "table"
    return el("div", body, class_="scroll", tabindex="0", role="region", aria_label=label)


def data_behind(head: list[str], rows: list[list[Child]]) -> Html:
    """The numbers of a chart, folded away: for screen readers, for copying, and for the curious."""
    return el("details", el("summary", "Numbers"), table(head, rows, caption=None), class_="numbers")
