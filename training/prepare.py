"""From texts to what training reads: a split by whole documents, a tokenizer, and token ids.

    python training/prepare.py      # fetches what is missing; writes training/data, 10 MB, and params/corpora

Three parts share no document: `train`, `valid` (the curve, and which step's weights are kept) and `heldout`, which
nothing is chosen by. The tokenizer is byte-level BPE, trained on `train` alone.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fetch
import numpy as np
import yaml
from pieces import replacing, sha256, write_json
from recipes import BEGIN, PHI
from tqdm import tqdm

DATA = fetch.HERE / "data"
CORPORA = fetch.HERE.parent / "params"
SPECIAL = "<|endoftext|>"
BETWEEN = "\n\n"
HELD_OUT_ADDRESSES = ("1829_andrew_jackson_d", "1887_grover_cleveland_d", "1984_ronald_reagan_r")
VALID_ADDRESSES = ("1810_james_madison_dr", "1901_theodore_roosevelt_r", "1964_lyndon_b_johnson_d")
NOVEL_TAIL, MOBY_TAIL = 1, 3
"""Documents at a novel's end that are held out; as many before them are for validation."""
SHINGLE = 12
"""Words in a row that count as copied."""


def split() -> dict[str, list[str]]:
    """Documents by part: train, valid, heldout. Raises fetch.SourceError if a text was not fetched."""
    parts: dict[str, list[str]] = {"train": [], "valid": [], "heldout": []}
    novels: dict[str, list[str]] = {}
    for title, text in [*fetch.documents("austen"), *fetch.documents("moby-dick")]:
        novels.setdefault(title.rsplit(" ", 1)[0].rstrip(","), []).append(text)
    for name, chapters in novels.items():
        tail = MOBY_TAIL if name == "Moby Dick" else NOVEL_TAIL
        parts["train"] += chapters[: -2 * tail]
        parts["valid"] += chapters[-2 * tail : -tail]
        parts["heldout"] += chapters[-tail:]
    for title, text in fetch.documents("addresses"):
        part = "heldout" if title in HELD_OUT_ADDRESSES else "valid" if title in VALID_ADDRESSES else "train"
        parts[part].append(text)
    return parts


def shingles(texts: Iterable[str]) -> Iterator[str]:
    """Every SHINGLE words in a row of each text."""
    for text in texts:
        words = text.split()
        for i in range(len(words) - SHINGLE + 1):
            yield " ".join(words[i : i + SHINGLE])


def copied(texts: list[str], train: list[str]) -> float:
    """The share of the texts' SHINGLE words in a row that stand in `train` too."""
    own = list(shingles(texts))
    return len(set(own) & set(shingles(train))) / max(1, len(set(own)))


def tokenizer(texts: list[str], size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens, trained on `texts`; id BEGIN is SPECIAL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if made.get_vocab_size() != size or made.token_to_id(SPECIAL) != BEGIN:
        raise ValueError(f"the tokenizer has {made.get_vocab_size()} tokens, not {size}: there is too little text")
    return made


def load(path: Path) -> Any:
    """The tokenizer in a `tokenizer.json`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def corpora(parts: dict[str, list[str]]) -> dict[str, str]:
    """The two texts that quality is measured on, and the one that importance matrices are made of, by name."""
    scripture = [text for _, text in fetch.documents("genesis")]
    of = {"prose": parts["heldout"], "scripture": scripture, "calibration": parts["valid"]}
    return {name: BETWEEN.join(texts) + "\n" for name, texts in of.items()}


def main() -> None:
    """Write data/{tokenizer.json,train.npy,valid.npy,meta.json}; check the corpora, or write them if missing."""
    fetch.main()
    parts = split()
    made = tokenizer(parts["train"], PHI.shape.vocab_size)
    with replacing(DATA / "tokenizer.json") as partial:
        made.save(str(partial))
    meta: dict[str, Any] = {"tokenizer_sha256": sha256(DATA / "tokenizer.json"), "vocab_size": PHI.shape.vocab_size}
    for part in ("train", "valid"):
        ids: list[int] = []
        for text in tqdm(parts[part], desc=f"tokenizing {part}", unit="document", disable=None):
            ids += [BEGIN, *made.encode(text).ids]
        with replacing(DATA / f"{part}.npy") as partial, partial.open("wb") as f:
            np.save(f, np.array([*ids, BEGIN], np.uint16))
        size = sum(len(t.encode()) for t in parts[part])
        meta[part] = {"documents": len(parts[part]), "bytes": size, "tokens": len(ids) + 1}
        meta[part]["sha256"] = sha256(DATA / f"{part}.npy")
    meta["copied_from_train"] = {part: copied(parts[part], parts["train"]) for part in ("valid", "heldout")}
    meta["shingle_words"] = SHINGLE
    for name, text in corpora(parts).items():
        path = CORPORA / "corpora" / f"{name}.txt"
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    write_json(DATA / "meta.json", meta)
    known = yaml.safe_load((CORPORA / "corpora.yaml").read_text(encoding="utf-8"))
    for name, entry in known.items():
        if (found := sha256(CORPORA / entry["file"])) != entry["sha256"]:
            raise fetch.SourceError(f"the corpus {name} has the SHA-256 {found}, not that of params/corpora.yaml")
    print(json.dumps(meta, indent=1))


if __name__ == "__main__":
    try:
        main()
    except fetch.SourceError as err:
        sys.exit(f"prepare: {err}")
