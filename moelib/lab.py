"""What JupyterLab and IPython complete with the tab key: the studies in `moelib.load("`. Names of columns after
`runs["` are pandas' own."""

from typing import Any


def _studies(shell: Any, event: Any) -> list[str]:
    import moelib

    return [name for name in moelib.studies().index if name.startswith(event.symbol)]


def install(shell: Any) -> None:
    """Let `shell`, an IPython shell, complete them."""
    shell.set_hook("complete_command", _studies, re_key=r""".*\bload\(["'][^"']*$""")
