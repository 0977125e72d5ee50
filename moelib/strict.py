"""The base of every schema: user-facing errors, frozen classes that refuse unknown keys, bounded whole numbers."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError


class UserError(Exception):
    """Raised with a message meant for people: the command line shows it without a traceback."""


class ParamsError(UserError, ValueError):
    """A name or a file in `params/` is wrong; the message lists what is allowed."""


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def upto(most: int, least: int = 1) -> Any:
    """Type of a whole number in [least, most].

    Limits are far above any real model or study and far below what would exhaust memory: a larger value is a mistake.
    """
    if least == 1:
        return Annotated[PositiveInt, Field(le=most)]
    return Annotated[int, Field(ge=least, le=most)]


T = TypeVar("T", bound=Strict)


def build(cls: type[T], where: str, data: Any, **more: Any) -> T:
    """Build `cls` from a mapping and `more`. Raises ParamsError that names `where`, each wrong field and its limits."""
    if not isinstance(data, dict):
        raise ParamsError(f"{where}: expected a mapping, found {type(data).__name__}")
    try:
        return cls.model_validate({**data, **more})
    except ValidationError as err:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'entry'}: {e['msg']}" for e in err.errors()]
        raise ParamsError(f"{where}: " + "; ".join(lines[:20])) from None
