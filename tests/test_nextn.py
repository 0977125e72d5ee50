"""Blocks that the engine does not load, on the real engine: header and engine agree to the last digit printed."""

import ggufs
import pytest
from factory import MANIFEST, measured, spec

from moelib.audit import audit
from moelib.base import files
from moelib.catalogue.facts import Manifest
from moelib.gguf import gguf_file
from moelib.measure import device, run
from moelib.measure.llama_server import LlamaServer
from moelib.models import models, quantize

pytestmark = pytest.mark.engine

OF_PLACEMENT = {"placement-on-device", "placement-moves", "layers-offloaded", "device-is-the-one", "memory-known"}
PRINTED = 2 * 0.005 * 2**20  # MiB with two decimals, and tensors padded to 32 bytes


@pytest.fixture
def source(home, tmp_path):
    path = ggufs.write_nextn(tmp_path / "glm.gguf")
    return models.Source("glm", "real", "full", path, files.sha256(path), "test")


def observed(engine, quantised, work, placement):
    plan = spec(placement=placement, workloads=("smoke",), requests=1)
    outcome = run.execute(plan, quantised, LlamaServer(engine), device.Loopback(), work)
    assert outcome.reason is None, outcome.message
    checks = audit.run(measured(plan, outcome.observation, Manifest(**quantised.manifest)))
    assert [c for c in checks if not c.passed and c.id in OF_PLACEMENT] == []
    assert {c.id for c in checks} >= OF_PLACEMENT
    return outcome.observation


@pytest.mark.parametrize("quant", [None, "Q4_K_M"])
def test_header_and_engine_agree_on_a_model_with_a_block_that_is_not_loaded(
    source, engine, tmp_path, quant, monkeypatch
):
    facts = {"sha256": source.sha256, "file_bytes": source.header.file_bytes}
    if quant:
        monkeypatch.setattr(quantize.sources, "whole", lambda source: source)
        quantised = quantize.make(source, quant, engine, tmp_path / "q")
    else:
        quantised = quantize.Quantised(source.header, MANIFEST.model_dump() | facts, files.Hashed(source.path))
    header = quantised.header
    assert header.layers == 3
    for placement in ("baseline", "cpu-moe", "n-cpu-moe=2"):
        observation = observed(engine, quantised, tmp_path / "work", placement)
        unused = {t.name for t in header.tensors if t.block == 3}
        assert set(observation.report.unused_tensors) == unused
        assert abs(observation.report.device_bytes("model") - header.device_bytes(placement)) <= PRINTED
        assert observation.placement.device_bytes == header.device_bytes(placement)
        assert observation.placement.moved_bytes == header.moved_bytes(placement)
        host = {b.size_bytes for b in observation.report.buffers if b.kind == "model" and b.place == "host"}
        assert sum(host) >= header.moved_bytes(placement) - PRINTED
    # counted as loaded, that layer would add half as much again
    whole = gguf_file.read_header(header.path).as_loaded(())
    assert whole.moved_bytes("cpu-moe") > 1.4 * header.moved_bytes("cpu-moe")
