import errno
import fcntl
import os

import numpy as np
import pytest

from moelib.base import files
from moelib.catalogue import params
from moelib.gguf import gguf_file, twin
from moelib.models import models


def write(path, name="deepseek-moe-16b", scale="nano", seed=0):
    return twin.write(path, params.model(name).at_scale(scale), seed=seed)


def test_the_same_seed_gives_the_same_bytes_and_the_hash_returned_is_theirs(tmp_path):
    first, second = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
    assert first == second == files.sha256(tmp_path / "a.gguf") == files.sha256(tmp_path / "b.gguf")
    assert write(tmp_path / "c.gguf", seed=1) != first


@pytest.mark.parametrize("scale", ["tiny", "nano"])
@pytest.mark.parametrize("name", ["phi-3.5-moe", "deepseek-moe-16b"])
def test_small_twins_keep_the_quirks(name, scale):
    g = params.model(name).at_scale(scale)
    names = {t.name for t in twin.tensors(g)}
    phi = name == "phi-3.5-moe"
    assert ("blk.0.attn_q.bias" in names) == ("output.bias" in names) == phi
    assert ("blk.0.ffn_gate.weight" in names) == ("blk.1.ffn_up_shexp.weight" in names) == (not phi)
    assert ("blk.0.ffn_gate_exps.weight" in names) == phi
    assert (g.expert_feed_forward_length % 256 == 0) == phi


def test_weights_are_random_finite_and_norms_are_one(tmp_path):
    write(tmp_path / "a.gguf", "phi-3.5-moe")
    header, data = gguf_file.read_header(tmp_path / "a.gguf"), (tmp_path / "a.gguf").read_bytes()
    for t in header.tensors:
        kind = np.float16 if t.type == "F16" else np.float32
        values = np.frombuffer(data, kind, count=t.nbytes // kind().itemsize, offset=t.offset).astype(float)
        if t.name.endswith("norm.weight"):
            assert (values == 1).all()
        else:
            if t.name == "output.weight":
                unspoken, values = np.split(values, [twin.UNSPOKEN * t.shape[0]])
                assert (unspoken == 0).all()
            assert np.abs(values).max() <= twin.WEIGHT_RANGE * 1.001
            if values.size > 10_000:  # uniform in +-range has a deviation of range / sqrt(3)
                assert values.std() == pytest.approx(twin.WEIGHT_RANGE / 3**0.5, rel=0.02)


def test_memory_stays_below_a_gibibyte_whatever_the_size(tmp_path, peak_rss):
    code = (
        "from pathlib import Path\n"
        "from moelib.catalogue import params; from moelib.gguf import twin\n"
        "one = {'block_count': 1, 'expert_count': 8, 'vocab_size': 320}\n"
        "g = params.model('phi-3.5-moe').at_scale('full').model_copy(update=one)\n"
        f"assert twin.nbytes(g) > 1 << 30; twin.write(Path({str(tmp_path / 'big.gguf')!r}), g)\n"
    )
    assert 0 < peak_rss(code) < 512 << 20


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(files.FileError, match="free some space"):
        write(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(twin._Pool, "pieces", lambda *_: (_ for _ in ()).throw(OSError("disk on fire")))
    with pytest.raises(OSError, match="fire"):
        write(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused_at", ["open", "pwrite"])
def test_a_disk_that_cannot_be_written_to_past_the_cache_gets_the_same_bytes(tmp_path, monkeypatch, refused_at):
    first, real, direct = write(tmp_path / "a.gguf"), getattr(os, refused_at), getattr(os, "O_DIRECT", 0)
    if not direct:
        pytest.skip("this system always writes through the cache")
    refusals = []

    def refusing(target, *more, **how):
        flags = more[0] if refused_at == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & direct:
            refusals.append(target)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *more, **how)

    monkeypatch.setattr(twin.os, refused_at, refusing)
    assert write(tmp_path / "b.gguf") == first == files.sha256(tmp_path / "b.gguf")
    assert len(refusals) == 1


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path, monkeypatch):
    real, room = os.pwrite, [1 << 20]

    def into_what_is_left(fd, data, at):
        return real(fd, data[: max(0, room[0] - at)], at)

    monkeypatch.setattr(twin.os, "pwrite", into_what_is_left)
    with pytest.raises(files.FileError, match=r"a\.gguf cannot be written: no space is left"):
        write(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_make_twin_writes_once_and_again_only_if_the_file_changed(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELIB_MODELS", str(tmp_path / "m"))
    source = models.make_twin("phi-3.5-moe", "nano")
    written = []
    real = twin.write
    monkeypatch.setattr(twin, "write", lambda *a, **k: written.append(a) or real(*a, **k))
    assert models.make_twin("phi-3.5-moe", "nano").sha256 == source.sha256
    source.path.touch()  # another time, the same bytes: hashed, not written
    assert models.make_twin("phi-3.5-moe", "nano").sha256 == source.sha256
    assert not written
    with source.path.open("r+b") as f:
        f.seek(-1000, 2)
        f.write(b"flipped")
    assert models.make_twin("phi-3.5-moe", "nano").sha256 == source.sha256
    assert len(written) == 1


def test_the_vocabulary_has_its_size_and_no_token_twice():
    tokens, scores, types = twin.vocabulary(2048)
    assert len(tokens) == len(set(tokens)) == len(scores) == len(types) == 2048
