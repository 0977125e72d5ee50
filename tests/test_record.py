import gzip
import json

import pytest
from conftest import FIXTURES
from factory import observation, record_of, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from moelib.audit import record
from moelib.base import files
from moelib.catalogue import facts


def test_a_record_comes_back_as_it_was(tmp_path):
    written = record.write(tmp_path, record_of())
    assert record.read(tmp_path / "records" / f"{written.run_id}.json") == written
    assert written.digest


def test_a_record_is_never_overwritten(tmp_path):
    record.write(tmp_path, record_of())
    with pytest.raises(record.RecordError, match="never overwritten"):
        record.write(tmp_path, record_of())


def test_where_the_file_was_is_kept(tmp_path):
    written = record.write(tmp_path, record_of(observation(cached_bytes=7, disk_read_bytes=9)))
    read = record.read(tmp_path / "records" / f"{written.run_id}.json")
    assert (read.observed.cached_bytes, read.observed.disk_read_bytes) == (7, 9)


def test_only_a_run_that_showed_something_has_an_observation():
    assert (run := record_of()).observation is run.observed
    with pytest.raises(RuntimeError, match=r"_a1 observed nothing: leave out"):
        record_of(status="failed").observation  # noqa: B018


@pytest.fixture
def written(tmp_path):
    r = record.write(tmp_path, record_of())
    return tmp_path / "records" / f"{r.run_id}.json"


@settings(deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_record_is_seen(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("r")
    r = record.write(folder, record_of())
    path = folder / "records" / f"{r.run_id}.json"
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(record.RecordError):
        record.read(path)


def test_a_changed_number_is_seen(written):
    text = written.read_text(encoding="utf-8")
    assert '"load_s":0.1' in text
    written.write_text(text.replace('"load_s":0.1', '"load_s":0.2'), encoding="utf-8")
    with pytest.raises(record.RecordError, match="digest"):
        record.read(written)


def forge(path, change):
    """Change a record and give it a digest that fits: only the schema can object now."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    data.pop("digest")
    data["digest"] = files.digest(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(note="x"),
        lambda d: d["spec"].update(note="x"),
        lambda d: d["observed"]["memory"].update(value_mib=1),
        lambda d: d["observed"]["requests"][0].update(tps=1.0),
        lambda d: d.update(status="fine"),
        lambda d: d.update(schema_version=record.SCHEMA_VERSION + 1),
        lambda d: d.pop("audit"),
        lambda d: d.update(run_id="another"),
        lambda d: d.update(device={"nonsense": 1}),
        lambda d: d["device"].update(note="x"),
        lambda d: d["device"].update(bandwidth_bytes_per_s=-1.0),
        lambda d: d["host"].update(ram_read_bytes_per_s=-1.0),
        lambda d: d["host"].update(cpus=0),
        lambda d: d["host"].update(host_id="my machine"),
        lambda d: d["sheet"].update(file_bytes="42"),
        lambda d: d["sheet"].update(bits_per_weight=0.0),
        lambda d: d["sheet"].update(sha256="abc"),
        lambda d: d["sheet"].pop("expert_bytes"),
        lambda d: d["engine"].update(build=True),
        lambda d: d.update(attempt=0),
        lambda d: d.update(started_utc="yesterday"),
        lambda d: d.update(judged={"record": "x"}),
        lambda d: d.update(raw={"../../etc/passwd": "a" * 64}),
        lambda d: d["observed"]["requests"][0].update(prompt_n=8.0),
        lambda d: d["observed"].update(load_s="0.1"),
        lambda d: d["observed"].update(cached_bytes=-1),
        lambda d: d["observed"].update(disk_read_bytes=0.5),
    ],
)
def test_what_the_schema_does_not_know_is_refused(written, change):
    forge(written, change)
    with pytest.raises(record.RecordError):
        record.read(written)


def test_damaged_records_are_set_aside_and_the_others_read(tmp_path):
    good = record.write(tmp_path, record_of())
    bad = tmp_path / "records" / "bad.json"
    for n in range(2):
        bad.write_text("{", encoding="utf-8")
        records, damaged = record.read_all(tmp_path, set_aside=True)
        assert [r.run_id for r in records] == [good.run_id]
        assert len(damaged) == 1
        assert not bad.exists()
        assert (bad.parent / "damaged" / f"bad.json.{n}").read_text(encoding="utf-8") == "{"


def test_reading_without_setting_aside_touches_nothing(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "bad.json").write_text("{", encoding="utf-8")
    assert len(record.read_all(tmp_path)[1]) == 1
    assert (tmp_path / "records" / "bad.json").exists()


def test_a_failed_run_is_a_record_too(tmp_path):
    failed = record.write(tmp_path, record_of(status="failed"))
    again = record.read_all(tmp_path)[0]
    assert again == [failed]
    assert (failed.observed, failed.done) == (None, False)


def test_ids_name_the_run_and_the_attempt():
    one, two = record_of(attempt=1), record_of(attempt=2)
    assert one.run_id != two.run_id
    assert one.key == two.key != record_of(block=1).key
    assert one.run_id.endswith("_a1")
    assert record.spec_key(spec()) == one.key


def test_logs_are_kept_compressed_the_same_each_time_without_this_machines_folders(tmp_path):
    engine, linked = tmp_path / "models/engine", tmp_path / "linked"
    engine.mkdir(parents=True)
    linked.symlink_to(engine)
    private = (tmp_path / "models", linked)
    log = tmp_path / "server.log"
    log.write_text(f"load {tmp_path}/models/x.gguf {linked}/libggml.so {engine}/libcuda.so\n" * 100, encoding="utf-8")
    first = record.keep_logs(tmp_path, "run", [log, tmp_path / "missing.log"], private)
    kept = gzip.decompress((tmp_path / "raw/run.server.log.gz").read_bytes())
    assert kept == b"load x.gguf libggml.so libcuda.so\n" * 100
    assert list(first) == ["run.server.log.gz"]
    assert record.keep_logs(tmp_path, "run", [log], private) == first


@settings(deadline=None)
@given(st.data())
def test_no_part_of_a_record_can_be_another_kind_of_thing(tmp_path_factory, data):
    """Any number of it put into words, or any part taken away, and it is no record."""
    folder = tmp_path_factory.mktemp("r")
    path = folder / "records" / f"{record.write(folder, record_of()).run_id}.json"

    def leaves(part):
        items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
        for key, value in items:
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield part, key
            yield from leaves(value)

    def far(key):
        """What no such number is; tokens' ids, logarithms, exit codes and ids of processes have no range."""
        free = ("exit_code", "cache_n") if isinstance(key, str) else (key,)
        return () if key in free else (10**18, -1 - 10**11)

    def change(d):
        parts = {k: d[k] for k in ("spec", "sheet", "engine", "device", "host", "observed")}
        part, key = data.draw(st.sampled_from(list(leaves(parts))))
        part[key] = data.draw(st.sampled_from([str(part[key]), [part[key]], {"x": 1}, True, *far(key)]))

    forge(path, change)
    with pytest.raises(record.RecordError):
        record.read(path)


def test_a_file_that_is_no_record_at_all_is_named(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b'{"digest": NaN}'):
        path.write_bytes(content)
        with pytest.raises(record.RecordError, match=r"x\.json"):
            record.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(record.RecordError, match=r"x\.json"):
        record.read(path)


def test_the_digest_is_of_the_content_however_it_is_laid_out(written):
    data = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps(data, indent=2), encoding="utf-8")
    assert record.read(written).digest == data["digest"]


def test_what_this_code_could_not_read_is_not_written(tmp_path):
    broken = record_of().model_copy(update={"started_utc": "yesterday"})
    with pytest.raises(record.RecordError, match="started_utc"):
        record.write(tmp_path, broken)
    assert not list(tmp_path.rglob("*.json"))


def test_every_schema_number_has_its_history():
    assert set(facts.HISTORY) == set(range(1, facts.SCHEMA_VERSION + 1))


def test_a_light_record_keeps_what_tables_need(tmp_path):
    path = tmp_path / "records" / f"{record.write(tmp_path, record_of()).run_id}.json"
    whole, lighten = record.read(path), record.Lightener()
    light, other = lighten(record.read(path)), lighten(record.read(path))
    assert light.sheet is other.sheet
    assert light.audit is other.audit
    assert [(q.tps, q.ttft_s, q.total_s) for q in light.observed.requests] == [
        (q.tps, q.ttft_s, q.total_s) for q in whole.observed.requests
    ]
    assert light.observed.memory.value_bytes == whole.observed.memory.value_bytes
    assert [(c.id, c.passed) for c in light.audit] == [(c.id, c.passed) for c in whole.audit]
    assert (light.run_id, light.key, light.digest, light.raw) == (whole.run_id, whole.key, whole.digest, whole.raw)
    assert [list(q.tokens) for q in light.observed.requests] == [list(q.tokens) for q in whole.observed.requests]


GOLDEN = FIXTURES / "record-v2.json"


def test_a_record_of_this_schema_can_be_read_as_long_as_it_lasts(tmp_path):
    """A record as it was written when this schema was new, from a run of the real engine on the loopback device."""
    (tmp_path / GOLDEN.name).write_bytes(GOLDEN.read_bytes())
    run = json.loads(GOLDEN.read_text(encoding="utf-8"))["run_id"]
    path = (tmp_path / GOLDEN.name).rename(tmp_path / f"{run}.json")
    r = record.read(path)
    assert (r.status, r.spec.quant, r.device.kind) == ("valid", "Q4_K_M", "loopback")
    assert len(r.observed.requests) == 4
    assert (r.observed.cached_bytes, r.observed.disk_read_bytes) == (None, None)  # nobody looked
    assert r.observed.memory.value_bytes > r.observed.memory.engine_bytes
    assert r.observed.requests[1].tps == pytest.approx(
        80 / (r.observed.requests[1].token_s[-1] - r.observed.requests[1].token_s[19])
    )
