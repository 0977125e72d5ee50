"""`moelib`: the commands, without logic of their own. Each imports what it needs: `--help` is quick."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from moelib import __version__, cli_study
from moelib.base import neutral
from moelib.terminal import FAILED, MODELS, QUANTS, Formatter, Group, planned, say, say_all


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log each step.")
def main(verbose: bool) -> None:
    """Measure what MoE CPU offload saves in VRAM and costs in tokens/s and TTFT."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


@main.command()
@click.option("--engine", "engine_path", help="Folder of llama.cpp's tools.")
def doctor(engine_path: str | None) -> None:
    """Show what is installed, what is missing and how to fix it."""
    from moelib import doctor as doctors  # scipy takes its time

    findings = list(doctors.examine(engine_path))
    missing = [name for name, _, cure in findings if cure]
    say(f"{len(missing)} to fix: {', '.join(missing)}" if missing else "all that a study needs is here")
    width = max(len(what) for what, _, _ in findings)
    for what, value, cure in findings:
        say(f"{'!!' if cure else 'ok'} {what:<{width}}  {value}")
        if cure:
            say(f"   {'':<{width}}  fix: {cure}")
    sys.exit(FAILED if any(cure for _, _, cure in findings) else 0)


@main.command()
@click.argument("file", type=click.Path(), metavar="FILE|hf:OWNER/REPO/PATH[@REVISION]")
@click.option("--json", "as_json", is_flag=True, help="All facts as JSON; sizes in bytes.")
def header(file: str, as_json: bool) -> None:
    """Show what a GGUF is, how much of it can be offloaded, and what each N moves.

    Only the header is read, also on the Hub: a few MB. Of a split model, name any file.
    """
    import json

    from moelib.gguf import gguf_file
    from moelib.models import remote
    from moelib.planner.describe import describe

    far = remote.header(file) if remote.is_address(file) else None
    described = describe(far.header if far else gguf_file.read_header(file))
    say(neutral.escaped(json.dumps(described.facts(), indent=2)) if as_json else described.text())
    if far:
        say(far, err=True)


@main.command()
@click.argument("model", metavar="MODEL|FILE.gguf", shell_complete=MODELS)
@click.option("--quant", shell_complete=QUANTS, help="Types that llama-quantize would give. Default: the header's own.")
@click.option("--layers", type=int, help="Only the first so many layers.")
@click.option("--scale", default="full", show_default=True, help="full, or one that models.yaml names: tiny, nano.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: under models/.")
def twin(model: str, quant: str | None, layers: int | None, scale: str, seed: int, out: Path | None) -> None:
    """Write a geometry twin of MODEL, or of the header of FILE.gguf: its tensors and types, random weights."""
    from moelib.models import models, quantize

    if quant or layers is not None or seed or out or model.endswith(".gguf"):
        made = quantize.twin(*quantize.outline_of(model, scale), quant, layers, scale, seed, out)
        say(f"{made.path}  {made.header.file_bytes} bytes  sha256 {made.manifest['sha256']}")
        return
    source = models.make_twin(model, scale)
    say(f"{source.path}  {source.header.file_bytes} bytes  sha256 {source.sha256}")


@main.command()
@click.argument("model", shell_complete=MODELS)
@click.option("--pin", metavar="OWNER/NAME", help="Look up this repository's F16 files on the Hub and pin them.")
@click.option("--revision", default="main", show_default=True, help="With --pin: branch, tag or commit.")
@click.option("--file", "named", metavar="PATH", help="With --pin: this file, or a part of a split model.")
@click.option("--from", "given", type=click.Path(exists=True, path_type=Path), help="An F16 GGUF, or safetensors.")
def fetch(model: str, pin: str | None, revision: str, named: str | None, given: Path | None) -> None:
    """Get MODEL's real weights: the files pinned in params/pins.yaml, or what --from names."""
    if named and not pin:
        raise click.UsageError("--file names a file of the repository that --pin names: give both")
    if pin and given:
        raise click.UsageError("--pin asks the Hub, --from takes local files: give one of them")

    from moelib.models import sources

    if pin:
        pinned = sources.pin(model, pin, revision, named=named)
        size = sum(f.bytes for f in pinned.files.values())
        say(f"pinned {pinned.repository}@{pinned.revision}: {len(pinned.files)} files, {size / 2**30:.2f} GiB")
        for name in pinned.files:
            say(f"  {name}")
        say(f"written to params/pins.yaml; `moelib fetch {model}` downloads them")
        return
    source = sources.adopt(model, given) if given else sources.fetch(model)
    say(f"{source.path}  {source.header.file_bytes} bytes  sha256 {source.sha256}  from {source.origin}")


@main.command()
@click.argument("model", shell_complete=MODELS)
@click.argument("quant", shell_complete=QUANTS)
@click.option("--scale", default="full", show_default=True, help="Scale of the twin to quantise.")
@click.option("--real", is_flag=True, help="The real weights, not a twin.")
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE", help="Of llama-imatrix, for this model.")
def quantize(model: str, quant: str, scale: str, real: bool, imatrix: Path | None) -> None:
    """Quantise MODEL's twin, or its real weights, to QUANT and print the file's manifest.

    QUANT is any type that `llama-quantize --help` lists; IQ1, IQ2 and others need an --imatrix.
    """
    from moelib.base import files
    from moelib.models import quantize as quants

    made = quants.from_source(model, quant, scale, "real" if real else "twin", imatrix)
    say(f"{made.path}\n{files.canonical(made.manifest).decode()}")


@main.command()
@click.argument("what", metavar="MODEL|FILE|hf:OWNER/REPO/PATH[@REVISION]", shell_complete=MODELS)
@click.option(
    "--quant", "quants", multiple=True, shell_complete=QUANTS, help="Of a MODEL; default: Q4_K_M, Q2_K, Q8_0."
)
@click.option("--vram", metavar="SIZE", help="Of the card, such as 12GiB; default: that of the GPU here.")
@planned
def plan(
    what: str,
    quants: tuple[str, ...],
    vram: str | None,
    ram: str | None,
    context: int | None,
    ubatch: int | None,
    kv: str | None,
) -> None:
    """Tell from a header which --n-cpu-moe fits a card, what it needs, and the command; nothing is run.

    Of a MODEL of the catalogue, each --quant is planned as llama-quantize would make it.
    """
    from moelib.catalogue import params, sizes
    from moelib.measure import device
    from moelib.planner import budget, named

    vram_bytes = sizes.parse(vram) if vram else device.card_bytes()
    ram_bytes = sizes.parse(ram) if ram else None
    headers = named.headers(what, quants or params.QUANTS)
    plans = [budget.plan(h, vram_bytes, ram_bytes, context, ubatch, kv) for h in headers]
    for line in plans[0].lines() if len(plans) == 1 else budget.compared(plans):
        say(line)


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--vram", metavar="SIZE", help="That may be used, such as 12GiB; default: all of the GPU here.")
@planned
@click.option("--rounds", default=3, show_default=True, help="Each runs every placement once.")
@click.option("--endpoint", metavar="http://127.0.0.1:PORT", help="A server that runs with FILE already; left running.")
@click.option("--placement", help="With --endpoint: the one that the server has, such as cpu-moe.")
@click.option("--beyond-loopback", is_flag=True, help="With --endpoint: also of another machine.")
def measure(
    file: Path,
    vram: str | None,
    ram: str | None,
    context: int | None,
    ubatch: int | None,
    kv: str | None,
    rounds: int,
    endpoint: str | None,
    placement: str | None,
    beyond_loopback: bool,
) -> None:
    """Measure FILE, any GGUF of a MoE model: the N that fits, its neighbours, and what each gives; resumable.

    With --endpoint: what a server of OpenAI's interface that runs already gives, in the placement that it has.
    """
    if bool(endpoint) != bool(placement) or (beyond_loopback and not endpoint):
        raise click.UsageError("--endpoint and --placement go together: the server cannot be asked which one it has")
    if endpoint and (vram or ram or ubatch or kv):
        raise click.UsageError("--endpoint: what the server was started with cannot be set here; leave the plan out")

    from moelib.campaign import bench, sweep
    from moelib.catalogue import sizes
    from moelib.measure import device

    if endpoint and placement:
        path = bench.at_endpoint(file, endpoint, placement, context, rounds, beyond_loopback, say)
        say(f"document: {os.path.relpath(path)}")
        return
    vram_bytes = sizes.parse(vram) if vram else device.card_bytes()
    ram_bytes = sizes.parse(ram) if ram else None
    made = sweep.measure(file, vram_bytes, ram_bytes, context, ubatch, kv, rounds, say=say)
    say(made.path.read_text(encoding="utf-8").split("\n| placement")[0].rstrip())
    say(f"document: {os.path.relpath(made.path)}; all of it: moelib report {made.study.name}")
    problems = made.study.problems
    say_all(problems, err=True)
    sys.exit(FAILED if problems else 0)


@main.command()
@click.argument("what", metavar="MODEL|FILE|hf:OWNER/REPO/PATH[@REVISION]", shell_complete=MODELS)
@click.option("--quant", shell_complete=QUANTS, help="Of a MODEL; default: Q4_K_M.")
@click.option("--vram", metavar="SIZE", help="Of the card, such as 12GiB; default: that of the GPU here.")
@planned
@click.option("--scale", default="full", show_default=True, help="Of a MODEL: full, or one that models.yaml names.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each slice in each placement.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda or loopback.")
def preview(what: str, vram: str | None, ram: str | None, **asked: Any) -> None:
    """Run two slices of a model's twin here, and predict tokens/s and TTFT of every placement from them.

    Nothing is downloaded but the header of a file on the Hub. The slices are removed at the end; Ctrl-C is safe.
    """
    from moelib import face

    for line in face.preview(what, vram, ram=ram, **asked).lines():
        say(line)


for command in cli_study.COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
