"""Read YAML that people wrote, with limits on size, nesting depth and numbers; aliases are refused."""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 18  # the longest file of params/ has 4 kB
MAX_DEPTH = 30
MAX_DIGITS = 100  # a number of a million digits takes minutes to read


class YamlError(ValueError):
    """The text is not YAML, or exceeds a limit; the message says which, without the file's name."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):  # nine lines of them can stand for a thousand million values
            raise YamlError(f"line {line} has an alias: write out what it stands for")
        if self.depth == MAX_DEPTH:
            raise YamlError(f"it is nested more than {MAX_DEPTH} levels deep, near line {line}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise YamlError(f"line {line} holds a number of more than {MAX_DIGITS} digits")
        return node


def loads(text: str) -> Any:
    """The data in `text`. Raises YamlError."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"it has more than {MAX_BYTES} characters")
    try:
        return yaml.load(text, _Loader)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError) as err:
        raise YamlError(" ".join(str(err).split())) from None  # a date 2026-13-45 is a ValueError


def load(path: Path) -> Any:
    """The data in the file at `path`. Raises YamlError, FileNotFoundError."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise YamlError(f"it has more than {MAX_BYTES} bytes")
        return loads(data.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise YamlError(f"byte {err.start} is not UTF-8: save it as UTF-8") from None
    except FileNotFoundError:
        raise
    except OSError as err:
        raise YamlError(f"it cannot be read: {err.strerror}") from None
