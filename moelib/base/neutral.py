"""Make strings from outside (records, manifests, plans, a GPU's driver) safe to show.

A name may hold anything: an escape sequence for the terminal, a tag or a link for the document, a line break that
ends a table's row. Plain text is returned unchanged. Digests and comparisons use the original strings.
"""

import re
import shlex
import unicodedata

LONGEST = 400
"""Characters shown of one string."""
GONE = "\N{REPLACEMENT CHARACTER}"
"""Replaces characters that are invisible or change how their neighbours are displayed."""
_SHAPELESS = ("Cc", "Cf", "Cs", "Co", "Cn")  # control, format (bidi, joiners), surrogate, private, unassigned
_SPECIAL = re.compile(
    r"(?P<escape>[\\`*\[\]~$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside a word, an underscore is not emphasis
    r"|^[#+=-])"  # these begin a heading or a list
    r"|(?P<entity>[<>&]|:(?=//)|(?<=\bwww)\.|(?<=\w)@(?=\w))",
    re.IGNORECASE,
)


def _visible(c: str) -> str:
    return GONE if unicodedata.category(c) in _SHAPELESS else c


def plain(text: object, longest: int | None = LONGEST) -> str:
    """`text` on one line, with visible characters only, cut after `longest`."""
    whole = " ".join(str(text).split())
    cut = whole if longest is None or len(whole) <= longest else whole[: longest - 1] + "…"
    return cut if cut.isascii() and cut.isprintable() else "".join(map(_visible, cut))


def lines(text: object) -> str:
    """`text` with its line breaks and spaces, and no other invisible character."""
    whole = str(text)
    if whole.isascii() and whole.replace("\n", "").isprintable():
        return whole
    return "".join(c if c in " \n" else " " if c.isspace() else _visible(c) for c in whole)


def markdown(text: object) -> str:
    """`text` escaped for Markdown: it shows as written, without tags, links, emphasis, code or mathematics."""
    shown = _SPECIAL.sub(lambda m: f"\\{m[0]}" if m["escape"] else f"&#{ord(m[0])};", plain(text))
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", shown)  # a numbered list


def code(text: object, longest: int | None = LONGEST) -> str:
    """`text` as inline code; backticks in it become apostrophes."""
    return f"`{plain(text, longest).replace('`', chr(39))}`"


def word(name: object) -> str:
    """A file's name as one word of a command, whatever it holds."""
    return shlex.quote(plain(name).replace("`", "'"))


def escaped(json_text: str) -> str:
    r"""JSON with the same values, in which invisible characters are written as \uXXXX."""
    shapeless = {c for c in set(json_text) if c != "\n" and _visible(c) == GONE != c}
    if not shapeless:
        return json_text
    units = {c: c.encode("utf-16-be", "surrogatepass") for c in shapeless}
    table = {ord(c): "".join(f"\\u{u[i : i + 2].hex()}" for i in range(0, len(u), 2)) for c, u in units.items()}
    return json_text.translate(table)


def label(text: object) -> str:
    """`text` as a label in a figure, where an unescaped `$` would begin mathematics."""
    return plain(text, 60).replace("$", r"\$")
