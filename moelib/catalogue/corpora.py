"""Texts over which quality is measured, each fixed by its SHA-256: `params/corpora.yaml`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from moelib.base import files
from moelib.base.schema import ParamsError, Sha256, Strict
from moelib.catalogue import params


class Corpus(Strict):
    """A text, and where it comes from."""

    name: str
    title: str
    file: Annotated[str, Field(pattern=r"^[\w./-]+\.txt$")]
    """Below params/."""
    sha256: Sha256
    bytes: PositiveInt | None = None
    language: str | None = None
    licence: str = Field(min_length=1)
    source: str = Field(min_length=1)
    calibration: bool
    """Whether importance matrices of this project are made of it."""
    training: str | None = None
    """What of it, or like it, this project's own models have seen."""

    @property
    def path(self) -> Path:
        return params.root() / "params" / self.file

    def verified(self) -> Path:
        """Its file. Raises ParamsError if that is missing or another text."""
        try:
            sha256 = files.sha256(self.path)
        except OSError as err:
            raise ParamsError(f"params/{self.file} of corpus {self.name} cannot be read ({err.strerror})") from None
        if sha256 != self.sha256:
            raise ParamsError(
                f"params/{self.file} is not corpus {self.name}: it has SHA-256 {sha256[:12]}..., not "
                f"{self.sha256[:12]}...; restore it from the repository"
            )
        return self.path


def corpus(name: str) -> Corpus:
    """Raises ParamsError for an unknown name."""
    return params.entry(Corpus, "corpus", "corpora.yaml", name)
