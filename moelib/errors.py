"""What a message says of a name that is not known."""

import difflib
from collections.abc import Collection


def near(name: str, names: Collection[str]) -> str:
    """What follows the name in a message: the nearest one that there is, or all."""
    if close := difflib.get_close_matches(name, names, 1, 0.6):
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""
