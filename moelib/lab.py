"""What JupyterLab and IPython know of moelib: the tab key completes the studies in `moelib.load("`, beside the columns
after `runs["`, which are pandas' own; and a header is shown as the description of its file."""

from typing import Any


def _studies(shell: Any, event: Any) -> list[str]:
    import moelib

    return [name for name in moelib.studies().index if name.startswith(event.symbol)]


def _header(header: Any) -> str:
    from moelib.planner.describe import describe

    return describe(header)._repr_html_()


def install(shell: Any) -> None:
    """Let `shell`, an IPython shell, complete and show them."""
    shell.display_formatter.formatters["text/html"].for_type_by_name("moelib.gguf.gguf_header", "Header", _header)
    shell.set_hook("complete_command", _studies, re_key=r""".*\bload\(["'][^"']*$""")
