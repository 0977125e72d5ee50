"""What every schema stands on: errors for people, classes that refuse unknown keys, and numbers with a range."""

import difflib
from collections.abc import Collection
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class UserError(Exception):
    """Raised with a message meant for people: the command line shows it without a traceback."""


class ParamsError(UserError, ValueError):
    """A name or a file in `params/` is wrong; the message lists what is allowed."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


T = TypeVar("T", bound=Strict)


def build(cls: type[T], where: str, data: Any, **more: Any) -> T:
    """Build `cls` from a mapping and `more`. Raises ParamsError that names `where`, each wrong field and its limits."""
    if not isinstance(data, dict):
        raise ParamsError(f"{where}: expected a mapping, found {type(data).__name__}")
    try:
        return cls.model_validate({**data, **more})
    except ValidationError as err:
        raise ParamsError(f"{where}: {faults(err)}") from None


def faults(err: ValidationError) -> str:
    """Each wrong field and its limits, at most 20."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in err.errors()[:20])


def closest(name: str, names: Collection[str]) -> str:
    """What follows a name that is not known in a message: the nearest one; empty where none is near."""
    close = difflib.get_close_matches(name, names, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def near(name: str, names: Collection[str]) -> str:
    """`closest`, or, where none is near, all that there are."""
    return closest(name, names) or (f"; there are {', '.join(names)}" if names else "")


# Stored numbers, each with a range, so that impossible values are refused on reading: far wider than anything that
# exists, `bounds` holds the limits of a machine. The field's name carries the unit.
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Index = Annotated[int, Field(ge=0, le=1 << 20)]
Seconds = Annotated[float, Field(ge=0, le=1e7)]
Elapsed = Annotated[float, Field(gt=0, le=1e7)]
"""Duration of something that happened, so above zero."""
Cpus = Annotated[int, Field(ge=1, le=1 << 16)]
Bits = Annotated[int, Field(ge=0, lt=1 << 64)]
Step = Annotated[float, Field(ge=-1e10, le=1e10)]
"""Seconds by which a clock was set forward or back."""
Joules = Annotated[float, Field(ge=0, le=1e12)]
Watts = Annotated[float, Field(ge=0, le=1e5)]
Megahertz = Annotated[int, Field(ge=0, le=100_000)]
BytesPerS = Annotated[float, Field(gt=0, le=1e15)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=1000)]
