"""Numbers as people read them: this is where bytes become MiB or GiB and seconds become milliseconds."""

from __future__ import annotations

from moelib.stats import Estimate

NONE = "n/a"


def byte_unit(largest: float) -> tuple[str, int]:
    """(name, bytes) of the unit in which `largest` reads well."""
    return ("GiB", 2**30) if largest >= 2 * 2**30 else ("MiB", 2**20)


def size(n: float | None) -> str:
    if n is None:
        return NONE
    name, unit = byte_unit(abs(n))
    return f"{n / unit:.2f} {name}"


def number(x: float, digits: int = 3) -> str:
    """`digits` significant figures, no exponent; whole numbers above that keep all of theirs."""
    if x == 0:
        return "0"
    text = f"{x:#.{digits}g}"
    value = float(text)
    if abs(value) >= 10 ** (digits - 1):
        return f"{x:.0f}"
    return text.rstrip(".")


def estimate(e: Estimate | None, scale: float = 1.0, digits: int = 3) -> str:
    """`value [low, high]`; the value alone where one measurement gives no interval."""
    if e is None:
        return NONE
    value = number(e.value * scale, digits)
    if e.low is None:
        return f"{value} (n = {e.n})"
    return f"{value} [{number(e.low * scale, digits)}, {number(e.high * scale, digits)}]"


def sizes(e: Estimate | None) -> str:
    """An estimate of bytes with its interval, in one unit."""
    if e is None:
        return NONE
    name, unit = byte_unit(abs(e.value))
    if e.low is None:
        return f"{e.value / unit:.2f} {name} (n = {e.n})"
    return f"{e.value / unit:.2f} [{e.low / unit:.2f}, {e.high / unit:.2f}] {name}"


def percent(x: float | None) -> str:
    return NONE if x is None else f"{100 * x:.1f} %"
