"""Read YAML that people wrote: every fault of a file is one sentence."""

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 18  # the longest file of params/ has 4 kB


class YamlError(ValueError):
    """The text is not YAML, or exceeds a limit; the message says which, without the file's name."""


def loads(text: str) -> Any:
    """The data in `text`. Raises YamlError."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise YamlError("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as err:
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
