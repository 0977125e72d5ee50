"""Quants: what a build's llama-quantize offers, and what is no quant of them."""

import re
from collections.abc import Iterable

from moelib.base.schema import ParamsError, closest
from moelib.catalogue.params import QUANTS
from moelib.engine.engine import Engine, EngineError
from moelib.machine import probe, process

HELP_S = 60.0
PLAIN = {"F32", "F16", "BF16"}
"""Types that llama-quantize offers beside quants."""


def offered(llama: Engine) -> dict[str, int]:
    """Quants that llama-quantize makes, F16 and such among them -> llama.cpp's number (`general.file_type`).

    Raises EngineError where it does not say.
    """
    try:
        text = probe.ask([llama.tool("llama-quantize"), "--help"], process.patience(HELP_S)).text
    except probe.ProbeError as err:
        raise EngineError(f"llama-quantize {err}") from None
    return {name: int(number) for number, name in re.findall(r"^ *(\d{1,4}) +or +(\w{1,40})\b", text, re.M)}


def check(llama: Engine, names: Iterable[str]) -> None:
    """Raise ParamsError for a name of which this build makes no quantised file, with the nearest that it makes.

    Those of `params.QUANTS` are made by every build, which is not asked then.
    """
    if not (names := set(names) - set(QUANTS)):
        return
    known = [name for name in offered(llama) if name not in PLAIN]
    for name in sorted(names):
        if name in PLAIN:
            raise ParamsError(f"{name} is not quantised, and what is measured are quants: {', '.join(known)}")
        if name not in known:
            near = closest(name.upper(), known)
            raise ParamsError(f"unknown quant {name!r}{near}; {llama} makes {', '.join(known)}")
