"""moelib: what MoE CPU offloading buys and costs, measured so that it survives an audit.

study = moelib.load("h200")
study.runs.plot.scatter("vram_bytes", "tokens_per_s/mixed-512")
moelib.compare(study.runs, "tokens_per_s/mixed-512")

file = moelib.quantize("deepseek-moe-16b", "Q2_K", scale="tiny")
sweep = [moelib.run(file, placement) for placement in ("baseline", "cpu-moe")]
moelib.frame(sweep)[["placement", "status", "vram_bytes"]]

moelib.plan("mixtral-Q4_K_M.gguf", "12GiB").command  # the fewest layers' experts on the CPU that fit the card
moelib.preview("mixtral-Q4_K_M.gguf", "12GiB").frame  # its tokens/s and TTFT on this machine, predicted from two slices
"""

import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Record", "compare", "frame", "header", "load", "plan", "preview", "quantize", "run", "studies", "twin"]

if TYPE_CHECKING:
    from moelib.face import Record, compare, frame, header, load, plan, preview, quantize, run, studies, twin


def __getattr__(name: str) -> Any:
    """The face, imported when it is first used: `import moelib` alone stays cheap."""
    if name in __all__:
        from moelib import face

        return getattr(face, name)
    raise AttributeError(f"module 'moelib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
    from moelib import lab

    lab.install(shell)
