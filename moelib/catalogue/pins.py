"""`params/pins.yaml`: the files on the Hub that hold each model's weights. Only `moelib fetch --pin` writes it.

It is always written completely, and only if its text reads back the same. People edit `params/models.yaml`.
"""

from pathlib import Path

import yaml

from moelib.base import files, yaml_file
from moelib.base.schema import build
from moelib.catalogue import params
from moelib.catalogue.upstream import Pin

HEAD = "# `moelib fetch MODEL --pin OWNER/NAME` alone writes this file, whole each time; people write models.yaml.\n"


class PinsError(params.UserError):
    """The file of pins cannot be read or written; the message says what to do."""


def path() -> Path:
    return params.root() / "params" / "pins.yaml"


def read() -> dict[str, Pin]:
    """Model -> its pin. Raises PinsError if the file is damaged."""
    try:
        return _checked(yaml_file.load(path()))
    except FileNotFoundError:
        return {}
    except (yaml_file.YamlError, params.ParamsError) as err:
        raise PinsError(
            f"{path()} is damaged ({err}): restore it from git, or delete it and pin each model again with "
            "`moelib fetch MODEL --pin OWNER/NAME`"
        ) from None


def _checked(data: object) -> dict[str, Pin]:
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise params.ParamsError(f"expected a mapping of models, found {type(data).__name__}")
    return {name: build(Pin, name, entry) for name, entry in data.items()}


def of(model: str) -> Pin | None:
    """The pin of `model`, or None."""
    return read().get(model)


def write(model: str, pin: Pin) -> None:
    """Pin `model`. Raises PinsError, with nothing written, if the new text would not read back the same."""
    with files.lock(path().with_name(".pins.lock"), "params/pins.yaml"):
        pins = read() | {model: pin}
        data = {name: pins[name].model_dump() for name in sorted(pins)}
        text = HEAD + yaml.safe_dump(data, allow_unicode=True, width=1000, sort_keys=False)
        try:
            if _checked(yaml_file.loads(text)) != pins:
                raise params.ParamsError("the new text would not read back")
        except (yaml_file.YamlError, params.ParamsError) as err:
            raise PinsError(f"{model} was not pinned and {path().name} is unchanged: {err}") from None
        files.write_bytes(path(), text.encode("utf-8"))
