"""Recognise files that are named like a GGUF but are something else, by their first bytes, and say the next step."""

import re
import struct

LOOK_BYTES = 512
OLD = {b"tjgg": "GGJT", b"lmgg": "GGML", b"fmgg": "GGMF", b"algg": "GGLA", b"ggml": "GGML", b"ggjt": "GGJT"}
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}
CONVERT = "convert the folder that it came in: `moelib fetch MODEL --from FOLDER`"
PART = re.compile(r"part(\d+)of(\d+)", re.IGNORECASE)


def part(name: str) -> tuple[str, str] | None:
    """(cause, next step) for a file whose name says that it is one slice of a larger file; else None."""
    if m := PART.search(name):
        whole = name[: m.start()].rstrip("(._- ") or "it"
        return f"it is slice {m[1]} of {m[2]} of a file split for upload", f"join the slices of {whole} with cat"
    return None


def cause(first: bytes, name: str) -> tuple[str, str] | None:
    """(cause, next step) for a file that begins with the bytes `first` (some hundred); None for a readable GGUF."""
    if not first:
        return "it is empty", "fetch it again"
    if first[:4] == b"GGUF":
        return _version(first)
    kind, step = _kind(first, name)
    return f"it is not a GGUF file: {kind}", step


def _version(first: bytes) -> tuple[str, str] | None:
    if len(first) < 24:
        return f"truncated: {len(first)} bytes are less than any GGUF", "fetch it again"
    little, big = (struct.unpack_from(f"{order}I", first, 4)[0] for order in "<>")
    if little in (2, 3):
        return None
    if little == 1:
        return "it is of GGUF version 1, of August 2023, which llama.cpp no longer reads", "take a newer conversion"
    if big in (1, 2, 3):
        return (
            "it is a big-endian GGUF, as mainframes read it",
            "take the little-endian file, or convert it with `gguf-convert-endian FILE little`",
        )
    if little < 64:
        return (
            f"it is of GGUF version {little}; versions 2 and 3 are read",
            "update moelib and llama.cpp, or take an older file",
        )
    return f"corrupt: GGUF version {little}", "fetch it again"


def _kind(first: bytes, name: str) -> tuple[str, str]:
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if sliced := part(name):
        return sliced
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file in a clone", "run `git lfs pull` in the clone"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")):
        return (
            "a web page, as a site sends if a login is needed or the name is wrong",
            "open the address in a browser, then fetch the file itself, with a token where one is needed",
        )
    if len(first) > 8 and first[8:9] == b"{" and struct.unpack_from("<Q", first)[0] < 1 << 30:
        return "safetensors, a model as it is published", CONVERT
    if text.startswith((b"{", b"[")):
        return "JSON, such as a site's error or a model's settings", "fetch the GGUF itself"
    if first.startswith(b"PK\x03\x04"):
        return "a zip archive, as PyTorch's checkpoints are", f"unpack it if it holds a GGUF, else {CONVERT}"
    if re.match(rb"\x80[\x02-\x05]", first):
        return "a Python pickle, as PyTorch's older checkpoints are", CONVERT
    if old := OLD.get(first[:4]):
        return (
            f"a file in {old}, the format before August 2023",
            "llama.cpp no longer reads it: take a GGUF of the model",
        )
    if first.startswith(b"FUGG"):
        return (
            "a big-endian GGUF, as mainframes read it",
            "take the little-endian file, or convert it with `gguf-convert-endian FILE little`",
        )
    if packed := next((how for magic, how in PACKED.items() if first.startswith(magic)), None):
        return f"it is compressed with {packed}", "unpack it"
    if first[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    if first.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras keeps models", "take the model's safetensors or a GGUF of it"
    if not first.strip(b"\0"):
        return "it begins with zeros, like a download that reserved its space and then stopped", "fetch it again"
    return f"it starts with {first[:4]!r}", "give a GGUF file, or fetch it again"
