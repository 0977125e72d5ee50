"""Read YAML that people wrote, with limits on size, nesting depth and the expansion of aliases."""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 18  # the longest file of params/ has 4 kB
MAX_DEPTH = 30
MAX_NODES = 100_000  # after expanding aliases: nine lines of YAML can expand to a thousand million nodes
MAX_DIGITS = 100  # a number of a million digits takes minutes to read


class YamlError(ValueError):
    """The text is not YAML, or exceeds a limit; the message says which, without the file's name."""


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(
                f"it is nested more than {MAX_DEPTH} levels deep, near line {self.peek_event().start_mark.line + 1}"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _expanded(node, {})
        return node


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of nodes under `node`, aliases expanded.

    Raises YamlError for too many nodes, a node that contains itself, or a number that is too long.
    """
    if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
        raise YamlError(f"line {node.start_mark.line + 1} holds a number of more than {MAX_DIGITS} digits")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = MAX_NODES  # if the node contains itself
        inside = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(_expanded(n, sizes) for n in inside)
    if sizes[id(node)] > MAX_NODES:
        raise YamlError(f"its aliases expand to more than {MAX_NODES} values, or refer to themselves: write them out")
    return sizes[id(node)]


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
