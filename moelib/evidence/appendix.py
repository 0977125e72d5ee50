"""The evidence behind a study's results: files, placement proof, audit, completeness, environment, records."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moelib.audit import audit
from moelib.audit.invariants import INVARIANTS, KINDS
from moelib.audit.record import Record
from moelib.base import stats
from moelib.base.neutral import code, markdown, plain
from moelib.base.stats import number, size
from moelib.catalogue.facts import ImatrixFacts, Manifest
from moelib.evidence.table import Table, Text, cite, cite_manifest, cite_overhead, facts, merged, several_load_modes
from moelib.machine import pagecache
from moelib.study import columns, overhead
from moelib.study.gather import NOT_RUN
from moelib.study.study import Study

BITS = ("bits/weight", "of the experts", "of the rest")
FEW = 4  # runs of a file that were not tried have a line each


def _types(count: dict[str, int]) -> str:
    return ", ".join(f"{n}x{markdown(t)}" for t, n in count.items())


def bits(manifest: Manifest) -> tuple[str, str]:
    """Bits per weight of the experts and of the rest; n/a where the manifest does not tell.

    It counts the experts' tensors by type, and not their weights. These follow exactly where all types are one, or all
    tensors of one size, as in every model that is quantised here: their bytes must then be those of whole blocks. What
    the rest has follows from the whole, which is known to four decimals: it gets the digits that are certain.
    """
    try:
        blocks = {t: GGML_QUANT_SIZES[GGMLQuantizationType[t]] for t in manifest.expert_types}
    except KeyError:
        return stats.NONE, stats.NONE
    tensors = sum(manifest.expert_types.values())
    if not tensors or not manifest.expert_bytes:
        return stats.NONE, f"{manifest.bits_per_weight:.2f}"
    bytes_of_one = sum(n * Fraction(blocks[t][1], blocks[t][0]) for t, n in manifest.expert_types.items())
    each = manifest.expert_bytes / bytes_of_one
    if len(blocks) > 1 and any(each % weights for weights, _ in blocks.values()):
        return stats.NONE, stats.NONE
    experts = 8 * manifest.expert_bytes / (each * tensors)
    left = manifest.parameters - each * tensors
    if left <= 0:
        return f"{float(experts):.2f}", stats.NONE
    low, high = (
        float(manifest.parameters * (manifest.bits_per_weight + off) - 8 * manifest.expert_bytes) / float(left)
        for off in (-5e-5, 5e-5)
    )
    certain = (f"{low:.{n}f}" for n in (2, 1, 0) if f"{low:.{n}f}" == f"{high:.{n}f}")
    return f"{float(experts):.2f}", next(certain, stats.NONE)


def untold(rows: Iterable[dict[str, object]]) -> str:
    """Why bits per weight of files are not known, where they are not."""
    if any(row[name] == stats.NONE for row in rows for name in BITS):
        return "Bits per weight are n/a where the manifest, which counts tensors by type, does not tell weights."
    return ""


def files_table(study: Study) -> Table:
    order = {name: i for i, name in enumerate(study.statuses)}
    # a manifest of no planned cell comes last
    manifests = sorted(study.manifests, key=lambda s: (order.get(f"{s.model}/{s.quant}", len(order)), s.model, s.quant))
    rows = [
        {
            "model": markdown(s.model),
            "quant": markdown(s.quant),
            "size": size(s.file_bytes),
            **dict(zip(BITS, (f"{s.bits_per_weight:.2f}", *bits(s)), strict=True)),
            "experts": size(s.expert_bytes),
            "expert tensor types": _types(s.expert_types),
            "other tensor types": _types(Counter(s.tensor_types) - Counter(s.expert_types)),
            "fallbacks": len(s.fallbacks),
            "SHA-256": f"`{s.sha256[:12]}`",
        }
        for s in manifests
    ]
    note = (
        "A fallback is a tensor whose rows do not fit k-quants, so it has another type; the manifests in `quants/` "
        "list them."
    )
    note = f"{note} {untold(rows)}".strip()
    return Table("files", rows, [*map(cite_manifest, manifests)], note, ("size", *BITS, "experts", "fallbacks"))


def ledger_table(blocks: Sequence[Sequence[Record]]) -> Table:
    """Placement proof of every round: expert bytes moved by the header, and VRAM saved by the engine's buffers."""
    rows, sources, several = [], [], several_load_modes(r.spec for b in blocks for r in b)
    for base, r in ((audit.reference(b), r) for b in blocks for r in b):
        if r is base:
            continue
        before, after = base.observation, r.observation
        vram = [o.memory.value_bytes for o in (before, after) if o.memory.value_bytes is not None]
        weights = [o.report.device_bytes("model") or 0 for o in (before, after)]
        splits = [max(o.report.graph_splits, default=0) for o in (before, after)]
        hosts = {b.name for b in after.report.buffers if b.kind == "model" and b.place == "host"}
        moved = after.placement
        rows.append(
            {
                "model": markdown(r.spec.model),
                "quant": markdown(r.spec.quant),
                **_placement(r, several),
                "round": r.spec.block + 1,
                "expert tensors moved": f"{moved.moved_tensors} in {moved.moved_blocks} layers",
                "by the header": size(moved.moved_bytes),
                "saved by the engine's buffers": size(weights[0] - weights[1]),
                "VRAM saved": size(vram[0] - vram[1] if len(vram) == 2 else None),
                "weights on the host in": ", ".join(map(markdown, sorted(hosts))),
                "graph splits": f"{splits[0]} -> {splits[1]}",
            }
        )
        sources.append(cite([base, r]))
    numbers = ("round", "by the header", "saved by the engine's buffers", "VRAM saved", "graph splits")
    return Table("placement", rows, sources, numbers=numbers)


def _placement(r: Record, several: bool) -> dict[str, str]:
    """Placement of a run, with its load mode where there are several."""
    modes = {"load mode": markdown(r.spec.load_mode)} if several else {}
    return {"placement": markdown(r.spec.placement)} | modes


def runs_table(records: Sequence[Record]) -> Table:
    """One row per run: its VRAM, and tokens/s and TTFT of its requests."""
    rows, sizes = [], {"VRAM": "value_bytes", "engine's buffers": "engine_bytes", "rest": "residual_bytes"}
    ordered = sorted(records, key=lambda r: (r.spec.block, r.spec.order))
    several = several_load_modes(r.spec for r in records)
    for r in ordered:
        o = r.observed
        row = {"round": r.spec.block + 1, **_placement(r, several), "status": r.status}
        row["reasons"] = ", ".join(map(markdown, r.reasons)) or "-"
        row |= {k: size(getattr(o.memory, name) if o else None) for k, name in sizes.items()}
        row["load, s"] = _load(r) if o else stats.NONE
        for q in o.requests if o else ():
            row[f"{markdown(q.workload)} #{q.index + 1}"] = f"{number(q.tps)} tokens/s, {number(q.ttft_s, 1000)} ms"
        rows.append(row)
    return Table("runs", rows, [cite([r]) for r in ordered], numbers=("round", *sizes, "load, s"))


def _load(r: Record) -> str:
    """Load time, and whether the file was cached, where the record says it."""
    share = columns.cached_share(r)
    return number(r.observation.load_s) + ("" if share is None else f", {pagecache.state(share)}")


def completeness_table(study: Study) -> Table:
    rows, sources = [], []
    for name, s in study.statuses.items():
        records = [r for r in study.records if r.cell == name]
        count = Counter(r.status for r in records)
        row = {"cell": markdown(name), "planned runs": s.planned, "usable": s.usable}
        row |= {k: s.tally[k] for k in ("valid", "degraded", "invalid", "missing")}
        row["in complete, usable rounds"] = sum(len(b) for b in s.rounds)
        rows.append({**row, **{f"{k} records": count[k] for k in ("valid", "degraded", "invalid", "failed")}})
        sources.append(cite(records))
    return Table("completeness", rows, sources, numbers=tuple(rows[0])[1:] if rows else ())


def audit_table(study: Study) -> Table:
    """How often every invariant held and failed, by the current rules: for runs with their logs, rounds, cells and the
    study."""
    held = Counter(c for r in study.evidence.standing.values() for c in study.evidence.checks.get(r.run_id, ()))
    held.update((c.id, c.passed) for s in study.statuses.values() for c in s.checks)
    held.update((c.id, c.passed) for c in study.audit)
    untold = any(passed is None for _, passed in held)
    rows = [
        {
            "invariant": i.id,
            "checks a": "round" if i.scope == "block" else i.scope,
            "limit": i.limit,
            "held": held[i.id, True],
            "failed": held[i.id, False],
            **({"cannot tell": held[i.id, None]} if untold else {}),
            "a failure": "degrades" if i.degrades else "invalidates",
        }
        for i in sorted(INVARIANTS.values(), key=lambda i: KINDS.index(i.scope))
    ]
    return Table("audit", rows, [cite(study.records)] * len(rows), numbers=("held", "failed", "cannot tell"))


def _listed(problems: Sequence[str]) -> list[str]:
    """One line each; a line a file where many of its runs were not tried."""
    idle = Counter(p.partition(" ")[0] for p in problems if p.endswith(f": {NOT_RUN}"))
    many = {cell: n for cell, n in idle.items() if n > FEW}
    kept = [p for p in problems if not (p.endswith(f": {NOT_RUN}") and p.partition(" ")[0] in many)]
    return [f"{cell}: {n} runs were not run" for cell, n in many.items()] + kept


def problems(study: Study) -> Text:
    """Every planned run without a usable result, as a list; then what is usable, degraded or re-audited."""
    wrong = "\n".join(f"- {markdown(p)}" for p in _listed(study.problems))
    text = f"Missing or not usable:\n\n{wrong}" if wrong else "Every planned run has a usable record."
    text += f"\n\n{markdown(study.summary())}."
    if study.tally["degraded"]:
        text += " The numbers of a *degraded* run are used; its reason names the invariant that failed at the time."
        if study.flags["watched-lightly"]:
            text += " `watched-lightly`: monitoring took more of a CPU than the rules allowed then."
    if again := [r for r in study.used if r.judged]:
        rules = ", ".join(markdown(c) for c in sorted({r.judged.commit[:12] for r in again if r.judged}))
        text += (
            f"\n\n{len(again)} runs were *re-audited*: earlier rules refused the readings in their first record, the "
            f"rules of commit {rules} accept them. Both records are kept; nothing was measured again."
        )
    listed = [plain(p, None) for p in study.problems]
    verdict = {"summary": study.summary(), "problems": listed, "rounds": len(study.rounds)}
    return Text("problems", text, cite(study.records), verdict)


def environment_table(study: Study) -> Table:
    """Engine, device, host and code of the usable runs; where values differ, each with its cells."""

    def values_of(r: Record) -> dict[str, str]:
        host, device = r.host, r.device
        commit = f"{host.commit or 'no git clone'}{' with local changes' if host.dirty else ''}"
        limit, sha256 = device.power_limit_watt, r.engine.server_sha256
        return {
            "engine": markdown(r.engine.version),
            f"{markdown(r.engine.runner)} SHA-256": f"`{sha256[:12]}`" if sha256 else "not started here",
            "device": f"{device.kind}: {markdown(device.name)}" if device.name else device.kind,
            "driver": markdown(device.driver or stats.NONE),
            "power limit": f"{limit:g} W" if limit else stats.NONE,
            "CPU": f"{markdown(host.cpu)}, {host.cpus} usable",
            "RAM": size(host.ram_bytes),
            "system": f"{markdown(host.system)}, Python {markdown(host.python)}",
            "moelib": f"{markdown(host.moelib)}, commit {commit}",
            "CPU threads": str(r.observation.threads),
        }

    def joined(values: dict[str, dict[str, None]]) -> str:
        if len(values) == 1:
            return next(iter(values))
        return "; ".join(f"{value} ({', '.join(map(markdown, values[value]))})" for value in sorted(values))

    done, known = [r for r in study.done if r.observed], {}
    cells_by_value: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for r in done:
        parts = (r.engine, r.device, r.host, r.observation.threads)  # records read for tables share these objects
        if (of := (*map(id, parts), r.cell)) not in known:
            known[of] = parts
            for what, value in values_of(r).items():
                cells_by_value[what][value][r.cell] = None
    return facts("environment", {what: joined(values) for what, values in cells_by_value.items()}, cite(done))


def harness_table(study: Study) -> Table:
    """Measurement overhead: this program's numbers against the engine's, and with monitoring against without."""
    if not study.overhead:
        why = "not measured in this study (`benchmarks/overhead.py --out`)."
        return Table("harness", [], [], why_empty=why)
    rows, sources = [], []
    for name, measured in study.overhead.items():
        about = measured.about
        what = markdown(f"{about.model} {about.quant} at {(about.host.commit or stats.NONE)[:7]}")
        for placement, ratio, e in overhead.ratios(measured):
            where = {"file, commit": what, "placement": markdown(placement), "ratio": ratio.name}
            rows.append(where | {"measured": stats.close(e), "pairs": e.n, "target": ratio.aim, "met": ratio.met(e)})
            sources.append(cite_overhead({name: measured}))
    abouts = [measured.about for measured in study.overhead.values()]
    setups = sorted({markdown(f"scale {a.scale}, {a.workload}, on {a.device.name}") for a in abouts})
    note = (
        f"Ratios of decode tokens/s at {' and '.join(setups)}: geometric mean over pairs [95 % interval]. A pair is "
        "from one round, or two neighbouring time slots where monitoring is switched within one generation. The commit "
        "is that of the measuring code."
    )
    return Table("harness", rows, sources, note, ("measured", "pairs"))


def machines(study: Study) -> Text:
    """Which variation the intervals cover: that of one machine, or also between machines."""
    mixed = []
    for name, status in study.measured.items():
        cards = Counter(map(_card, status.rounds))
        if len(cards) > 1:
            mixed.append(f"{markdown(name)} ({' + '.join(map(str, cards.values()))} rounds{_ram(status.rounds)})")
    text = "- Rounds measure variation from run to run on one machine, not from machine to machine."
    if mixed:
        text = (
            f"- The rounds of {' and of '.join(mixed)} come from different machines of one kind: their intervals "
            "count the machine as a random factor. Elsewhere rounds measure variation from run to run on one "
            "machine."
        )
    if study.host_shared:
        text += (
            " Runs shared their host with others on its other GPUs (`exclusive: device`): experts on the CPU are read "
            "from the RAM that all of them share, so tokens/s and TTFT are not those of a run that is alone, and are "
            "compared with none."
        )
    return Text("machines", text, cite(study.used))


def apart(study: Study) -> str | None:
    """Which cells were measured on which machine, where each cell has one; None where all share one."""
    groups = defaultdict(list)
    for name, status in study.measured.items():
        cards = set(map(_card, status.rounds))
        if len(cards) == 1:
            groups[cards.pop()].append(name)
    if len(groups) < 2:
        return None
    ram = [_ram([b for name in g for b in study.measured[name].rounds]) for g in groups.values()]
    listed = [f"{', '.join(map(markdown, g))}{speed}" for g, speed in zip(groups.values(), ram, strict=True)]
    return (
        f"Measured on one machine each: {'; '.join(listed)}. A comparison of tokens/s or TTFT between cells of two "
        "machines also compares the machines, above all with experts on the CPU; ratios within a cell are of one "
        "machine."
    )


def _card(block: Sequence[Record]) -> str | None:
    return block[0].device.uuid or block[0].device.name


def _ram(blocks: Iterable[Iterable[Record]]) -> str:
    """The read bandwidth of host RAM before these runs, where all recorded it."""
    runs = [r for b in blocks for r in b]
    speeds = [r.host.ram_read_bytes_per_s / 1e9 for r in runs if r.host.ram_read_bytes_per_s is not None]
    return f", RAM read at {stats.span(speeds, number)} GB/s" if speeds and len(speeds) == len(runs) else ""


def workloads_table(study: Study) -> Table:
    rows, sources = [], []
    for name, w in study.workloads.items():
        runs = [r for r in study.done if name in r.spec.workloads]
        requests = [q for r in runs if r.observed for q in r.observed.requests if q.workload == name]
        lengths = sorted({q.prompt_n for q in requests if q.prompt_n is not None})
        counts = {"prompt tokens": ", ".join(map(str, lengths)) or stats.NONE, "tokens generated": w.generate_tokens}
        rows.append({"workload": markdown(name), "what": markdown(w.title), **counts})
        sources.append(cite(runs))
    return Table("workloads", rows, sources)


def records_table(study: Study) -> Table:
    """Every record by id, status and digest: the members of the sets that other tables cite."""
    rows = [{"record": code(r.run_id), "status": r.status, "digest": f"`{r.digest[:12]}`"} for r in study.records]
    return Table("records", rows, [cite([r]) for r in study.records])


def _made_by(manifest: Manifest) -> str:
    if manifest.engine_version is None:
        return f"not by moelib: {markdown(manifest.origin)}"
    return f"{markdown(manifest.engine_version)} in {number(manifest.quantize_s)} s"


def made(study: Study) -> Text:
    """From what and with what the files were made; those of one making share a line."""
    quants: dict[str, list[str]] = defaultdict(list)
    for m in study.manifests:
        how = f"source: {markdown(m.origin or 'of unknown origin')}"
        how += f" (SHA-256 `{m.source_sha256}`)" if m.source_sha256 else ""
        if m.engine_version is not None:
            matrix = f"with the imatrix {_imatrix(m.imatrix)}" if m.imatrix else "without an imatrix"
            how += f", with llama.cpp, {markdown(m.engine_version)}, {matrix}"
        quants[how].append(markdown(m.quant))
    lines = [f"- {', '.join(of)}: {how}." for how, of in quants.items()]
    return Text("made", "\n".join(lines), merged(map(cite_manifest, study.manifests)))


def _imatrix(matrix: ImatrixFacts) -> str:
    return f"{markdown(matrix.file_name)}, SHA-256 `{matrix.sha256}`"


def manifest_table(manifest: Manifest | None) -> Table:
    """The manifest of a quantised file."""
    if manifest is None:
        return Table("sheet", [], [], why_empty="no readable manifest.")
    counts = (manifest.tensor_types, manifest.expert_types)
    types, experts = (", ".join(f"{n} x {markdown(t)}" for t, n in count.items()) for count in counts)
    of_experts, of_rest = bits(manifest)
    fell = Counter((f.columns, f.type) for f in manifest.fallbacks)
    values = {
        "file": markdown(manifest.file_name),
        "size": size(manifest.file_bytes),
        "parameters": f"{manifest.parameters:,}",
        "bits per weight": f"{manifest.bits_per_weight:.2f}; {of_experts} of the experts, {of_rest} of the rest",
        "tensor types": types,
        "expert tensors": experts,
        "expert bytes": size(manifest.expert_bytes),
        "fallbacks": "; ".join(f"{n} x {c} columns -> {markdown(t)}" for (c, t), n in fell.items()) or "none",
        "SHA-256": f"`{manifest.sha256}`",
        "made by": _made_by(manifest),
        "weights": f"{manifest.weights}, scale {markdown(manifest.scale)}",
    }
    if manifest.imatrix:
        values["importance matrix"] = _imatrix(manifest.imatrix)
    return facts("sheet", values, cite_manifest(manifest))
