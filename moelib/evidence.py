"""What a study's findings stand on: files, placement proof, audit, completeness, environment, records."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from moelib import audit, harness, stats, words
from moelib.facts import Manifest
from moelib.invariants import INVARIANTS, KINDS
from moelib.neutral import code, markdown, plain
from moelib.record import Record
from moelib.stats import number, size
from moelib.study import Results
from moelib.table import Table, Text, cite, cite_harness, cite_manifest, facts


def _types(count: dict[str, int]) -> str:
    return ", ".join(f"{n}x{markdown(t)}" for t, n in count.items())


def files_table(results: Results) -> Table:
    order = {name: i for i, name in enumerate(results.statuses)}
    # a sheet of no planned cell comes last
    sheets = sorted(results.manifests, key=lambda s: (order.get(f"{s.model}/{s.quant}", len(order)), s.model, s.quant))
    rows = [
        {
            "model": markdown(s.model),
            "quant": markdown(s.quant),
            "file": size(s.file_bytes),
            "bits/weight": f"{s.bits_per_weight:.2f}",
            "experts": size(s.expert_bytes),
            "expert tensor types": _types(s.expert_types),
            "other tensor types": _types(Counter(s.tensor_types) - Counter(s.expert_types)),
            "fallbacks": len(s.fallbacks),
            "SHA-256": f"`{s.sha256[:12]}`",
        }
        for s in sheets
    ]
    note = "A fallback is a tensor whose rows k-quants cannot take; the sheets in `quants/` list them."
    return Table("files", rows, [*map(cite_manifest, sheets)], note, ("file", "bits/weight", "experts", "fallbacks"))


def ledger_table(blocks: Sequence[Sequence[Record]]) -> Table:
    """Placement proof of every block: what left the device by the header and by the engine's buffers."""
    rows, sources = [], []
    for base, r in ((audit.baseline(b), r) for b in blocks for r in b if r.spec.placement != "baseline"):
        before, after = base.observed, r.observed
        memory = [seen.memory.value_bytes for seen in (before, after)]
        weights = [seen.report.device_bytes("model") or 0 for seen in (before, after)]
        splits = [max(seen.report.graph_splits, default=0) for seen in (before, after)]
        hosts = {b.name for b in after.report.buffers if b.kind == "model" and b.place == "host"}
        moved = after.placement
        rows.append(
            {
                "model": markdown(r.spec.model),
                "quant": markdown(r.spec.quant),
                "arm": markdown(r.spec.arm),
                "block": r.spec.block + 1,
                "expert tensors moved": f"{moved.moved_tensors} in {moved.moved_blocks} blocks",
                "by the header": size(moved.moved_bytes),
                "off the device (engine)": size(weights[0] - weights[1]),
                "off the device (memory)": size(None if None in memory else memory[0] - memory[1]),
                "weights on the host in": ", ".join(map(markdown, sorted(hosts))),
                "graph splits": f"{splits[0]} -> {splits[1]}",
            }
        )
        sources.append(cite([base, r]))
    numbers = ("block", "by the header", "off the device (engine)", "off the device (memory)", "graph splits")
    return Table("placement", rows, sources, numbers=numbers)


def runs_table(records: Sequence[Record]) -> Table:
    """One row a run: what was read of its memory, and what its requests gave."""
    rows, sizes = [], {"device memory": "value_bytes", "engine's buffers": "engine_bytes", "rest": "residual_bytes"}
    ordered = sorted(records, key=lambda r: (r.spec.block, r.spec.order))
    for r in ordered:
        seen = r.observed
        row = {"block": r.spec.block + 1, "arm": markdown(r.spec.arm), "status": r.status}
        row["why"] = ", ".join(map(markdown, r.reasons)) or "-"
        row |= {k: size(getattr(seen.memory, name) if seen else None) for k, name in sizes.items()}
        row["load, s"] = number(seen.load_s) if seen else stats.NONE
        for q in seen.requests if seen else ():
            row[f"{markdown(q.workload)} #{q.index + 1}"] = f"{number(q.tps)} tok/s, {number(q.ttft_s, 1000)} ms"
        rows.append(row)
    return Table("runs", rows, [cite([r]) for r in ordered], numbers=("block", *sizes, "load, s"))


def completeness_table(results: Results) -> Table:
    rows, sources = [], []
    for name, s in results.statuses.items():
        here = [r for r in results.records if r.cell == name]
        count = Counter(r.status for r in here)
        row = {"cell": markdown(name), "planned runs": s.planned, "usable": s.usable}
        row |= {k: s.tally[k] for k in ("valid", "degraded", "invalid", "missing")}
        row["in whole, usable blocks"] = sum(len(b) for b in s.blocks)
        rows.append({**row, **{f"{k} records": count[k] for k in ("valid", "degraded", "invalid", "failed")}})
        sources.append(cite(here))
    return Table("completeness", rows, sources, numbers=tuple(rows[0])[1:] if rows else ())


def audit_table(results: Results) -> Table:
    """Every invariant, how often it held and how often not, by the rules of today: of runs as they stand with their
    logs, of blocks, cells and the study."""
    held = Counter(c for r in results.evidence.standing.values() for c in results.evidence.checks.get(r.run_id, ()))
    held.update((c.id, c.passed) for s in results.statuses.values() for c in s.checks)
    held.update((c.id, c.passed) for c in results.audit)
    rows = [
        {
            "invariant": i.id,
            "of a": i.of,
            "limit": i.limit,
            "held": held[i.id, True],
            "failed": held[i.id, False],
            "a failure": "degrades" if i.degrades else "invalidates",
        }
        for i in sorted(INVARIANTS.values(), key=lambda i: KINDS.index(i.of))
    ]
    return Table("audit", rows, [cite(results.records)] * len(rows), numbers=("held", "failed"))


def problems(results: Results) -> Text:
    """Every planned run without a usable result, as a list; then what is used with a flag."""
    wrong = "\n".join(f"- {markdown(p)}" for p in results.problems)
    text = f"Missing or not usable:\n\n{wrong}" if wrong else "Every planned run has a usable record."
    text += f"\n\n{markdown(words.summary(results))}."
    if results.tally["degraded"]:
        text += " A *degraded* run's numbers stand, with the flag of the invariant that did not hold."
    if again := [r for b in results.blocks for r in b if r.judged]:
        rules = ", ".join(markdown(c) for c in sorted({r.judged.commit[:12] for r in again}))
        text += (
            f"\n\n{len(again)} runs were *judged again*: their readings stand in an earlier record that the rules of "
            f"its day refused, and commit {rules} has later ones. Both records are here; nothing was measured anew."
        )
    told = [plain(p, None) for p in results.problems]
    verdict = {"summary": words.summary(results), "problems": told, "blocks": len(results.blocks)}
    return Text("problems", text, cite(results.records), verdict)


def environment_table(results: Results) -> Table:
    """Every distinct value of what the valid runs say of engine, device, host and code; of several, whose each is."""

    def told(r: Record) -> dict[str, str]:
        host, device, said = r.host, r.device, markdown
        commit = f"{host.commit or 'no git clone'}{' with local changes' if host.dirty else ''}"
        limit = device.power_limit_watt
        return {
            "engine": said(r.engine.version),
            "llama-server SHA-256": f"`{r.engine.server_sha256[:12]}`",
            "device": f"{device.kind}: {said(device.name)}",
            "driver": said(device.driver or stats.NONE),
            "power limit": f"{limit:g} W" if limit else stats.NONE,
            "CPU": f"{said(host.cpu)}, {host.cpus} usable",
            "RAM": size(host.ram_bytes),
            "system": f"{said(host.system)}, Python {said(host.python)}",
            "moelib": f"{said(host.moelib)}, commit {commit}",
            "llama-server threads": str(r.observed.threads),
        }

    def whose(values: dict[str, dict[str, None]]) -> str:
        if len(values) == 1:
            return next(iter(values))
        return "; ".join(f"{value} ({', '.join(map(markdown, values[value]))})" for value in sorted(values))

    done, known = [r for r in results.done if r.observed], {}
    found: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for r in done:
        parts = (r.engine, r.device, r.host, r.observed.threads)  # records read for tables share these objects
        if (of := (*map(id, parts), r.cell)) not in known:
            known[of] = parts
            for what, value in told(r).items():
                found[what][value][r.cell] = None
    return facts("environment", {what: whose(values) for what, values in found.items()}, cite(done))


def harness_table(results: Results) -> Table:
    """The harness's own numbers against the engine's."""
    if not results.accuracy:
        why = "not measured in this study (`benchmarks/harness_accuracy.py --out`)."
        return Table("harness", [], [], why_empty=why)
    rows, sources = [], []
    for name, found in results.accuracy.items():
        about = found.about
        what = markdown(f"{about.model} {about.quant} at {(about.host.commit or stats.NONE)[:7]}")
        for placement, ratio, e in harness.ratios(found):
            told = {"file, commit": what, "placement": markdown(placement), "ratio": ratio.name}
            rows.append(told | {"found": stats.close(e), "pairs": e.n, "aim": ratio.aim, "met": ratio.met(e)})
            sources.append(cite_harness({name: found}))
    abouts = [found.about for found in results.accuracy.values()]
    setups = sorted({markdown(f"scale {a.scale}, {a.workload}, on {a.device.name}") for a in abouts})
    note = (
        f"Decode rates at {' and '.join(setups)}: geometric mean over pairs [95 % interval]. A pair is one round's, "
        "or, of watched / unwatched within one generation, two neighbouring slots of time. Commits are those of the "
        "harness."
    )
    return Table("harness", rows, sources, note, ("found", "pairs"))


def machines(results: Results) -> Text:
    """What the intervals hold: one machine's variation, or that between machines too."""
    mixed = []
    for name, status in results.measured.items():
        cards = Counter(map(_card, status.blocks))
        if len(cards) > 1:
            mixed.append(f"{markdown(name)} ({' + '.join(map(str, cards.values()))} blocks{_ram(status.blocks)})")
    text = "- Blocks measure variation from run to run on one machine, not from machine to machine."
    if mixed:
        text = (
            f"- The blocks of {' and of '.join(mixed)} come from different machines of one kind: their intervals hold "
            "what these machines differ by. Elsewhere blocks measure variation from run to run on one machine."
        )
    return Text("machines", text, cite(r for b in results.blocks for r in b))


def apart(results: Results) -> str | None:
    """Which cells were measured on one machine and which on another, where each has one; None where all share it."""
    groups = defaultdict(list)
    for name, status in results.measured.items():
        cards = set(map(_card, status.blocks))
        if len(cards) == 1:
            groups[cards.pop()].append(name)
    if len(groups) < 2:
        return None
    ram = [_ram([b for name in g for b in results.measured[name].blocks]) for g in groups.values()]
    told = [f"{', '.join(map(markdown, g))}{speed}" for g, speed in zip(groups.values(), ram, strict=True)]
    return (
        f"Measured on one machine each: {'; '.join(told)}. Where rates of cells from two machines are compared, the "
        "machines are as well, above all with experts on the CPU; ratios within a cell are of one machine."
    )


def _card(block: Sequence[Record]) -> str | None:
    return block[0].device.uuid or block[0].device.name


def _ram(blocks: Iterable[Iterable[Record]]) -> str:
    """How fast the host's memory was read before these runs, where all say it."""
    speeds = [r.host.ram_read_bytes_per_s for b in blocks for r in b]
    return "" if None in speeds or not speeds else f", RAM read at {stats.span([s / 1e9 for s in speeds], number)} GB/s"


def workloads_table(results: Results) -> Table:
    rows, sources = [], []
    for name, w in results.workloads.items():
        here = [r for r in results.done if name in r.spec.workloads]
        asked = {q.prompt_n for r in here if r.observed for q in r.observed.requests if q.workload == name}
        counts = {"prompt tokens": ", ".join(map(str, sorted(asked))) or stats.NONE}
        counts["tokens generated"] = w.generate_tokens
        rows.append({"workload": markdown(name), "what": markdown(w.title), **counts})
        sources.append(cite(here))
    return Table("workloads", rows, sources)


def records_table(results: Results) -> Table:
    """Every record by id, status and digest: what the set digests of the other tables stand for."""
    rows = [{"record": code(r.run_id), "status": r.status, "digest": f"`{r.digest[:12]}`"} for r in results.records]
    return Table("records", rows, [cite([r]) for r in results.records])


def manifest_table(sheet: Manifest | None) -> Table:
    """A quantised file's sheet."""
    if sheet is None:
        return Table("sheet", [], [], why_empty="there is none that can be read.")
    counts = (sheet.tensor_types, sheet.expert_types)
    types, experts = (", ".join(f"{n} x {markdown(t)}" for t, n in count.items()) for count in counts)
    fell = Counter((f.columns, f.type) for f in sheet.fallbacks)
    told = {
        "file": markdown(sheet.file_name),
        "size": size(sheet.file_bytes),
        "parameters": f"{sheet.parameters:,}",
        "bits per weight": f"{sheet.bits_per_weight:.2f}",
        "tensor types": types,
        "expert tensors": experts,
        "expert bytes": size(sheet.expert_bytes),
        "fallbacks": "; ".join(f"{n} x {c} columns -> {markdown(t)}" for (c, t), n in fell.items()) or "none",
        "SHA-256": f"`{sheet.sha256}`",
        "made by": f"{markdown(sheet.engine_version)} in {number(sheet.quantize_s)} s",
        "weights": f"{sheet.weights}, scale {markdown(sheet.scale)}",
    }
    return facts("sheet", told, cite_manifest(sheet))
