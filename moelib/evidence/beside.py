"""Two runners side by side, as a table and a paragraph."""

from moelib.answers import beside
from moelib.base import stats
from moelib.base.neutral import code, markdown
from moelib.catalogue.facts import SHIMMY_GENERATE
from moelib.evidence.table import Sources, Table, Text, cite, cite_of, heading
from moelib.study.study import Study

PENALISED = {SHIMMY_GENERATE: " (of shimmy generate after a penalty for repeated ones, which cannot be turned off)"}


def shown(study: Study) -> list[Table | Text]:
    """What two runners say and need of the same files; empty of a study that is shown beside none."""
    if not study.parameters.beside:
        return []
    title, other = heading("h-beside", "Beside the other runner"), beside.other(study)
    found = list(beside.pairs(study, other)) if other else []
    if other is None or not found:
        why = f"Study {markdown(study.parameters.beside)}, of the other runner, was not measured here."
        return [title, Text("beside", why, {})]
    mine, its = (markdown(s.parameters.runner) for s in (study, other))
    last = study.parameters.workloads[-1]
    rows, sources = [], []
    for p in found:
        (same, of), (a, b), (is_mine, is_its) = p.same_text, p.whole_s(last), p.proven
        rows.append(
            {
                "model": markdown(p.model),
                "quant": markdown(p.quant),
                "placement": p.placement,
                "placement proven": "by both" if is_mine and is_its else mine if is_mine else its if is_its else "no",
                "same text": f"{same} of {of}",
                f"{mine}, s": stats.estimate(a),
                f"{its}, s": stats.estimate(b),
            }
        )
        sources.append(_sources(p, other.name))
    likeliest = f"the likeliest tokens{PENALISED.get(study.parameters.runner, '')}"
    note = (
        f"The same files served by {mine} and, in study {markdown(other.name)}, by {its}. *Same text*: requests whose "
        f"text, of {likeliest}, is the same by both in all rounds: other kernels round differently, which makes "
        f"another token the likeliest sooner or later. Seconds from a warm request of {markdown(last)} to its last "
        "token, geometric mean [95 % interval] over runs. These times are of two studies, with other contexts, threads "
        f"and devices ({_setup(study)}; {_setup(other)}): `benchmarks/runners.py` compares both in one run."
    )
    return [title, _sentence(study, other, found), Table("beside", rows, sources, note, tuple(rows[0])[3:])]


def _setup(study: Study) -> str:
    r = study.used[0]
    return f"{markdown(study.parameters.runner)}: {r.spec.context_tokens:,} tokens, device {r.device.kind}"


def _sources(p: beside.Pair, name: str) -> Sources:
    return cite(p.mine) | cite_of(name, p.its)


def _sentence(study: Study, other: Study, found: list[beside.Pair]) -> Text:
    same, of = (sum(n) for n in zip(*(p.same_text for p in found), strict=True))
    proven = sum(p.proven == (True, True) for p in found)
    wrong = sum(not p.same_file for p in found)
    mine, its = (markdown(s.parameters.runner) for s in (study, other))
    files, silent = f"{wrong} other files" if wrong else "the same files", "; ".join(beside.unmeasured(study))
    command = " ".join(study.used[-1].observation.argv)
    text = (
        f"{mine} and {its} were given {files}: both put the experts where they were asked to in {proven} of "
        f"{len(found)} files and placements, and wrote the same text in {same} of {of} requests. Not measured of "
        f"{mine}: {silent}. A command line of {mine}, as it ran: {code(command)}."
    )
    return Text("beside-said", text, {k: v for p in found for k, v in _sources(p, other.name).items()})
