"""Two files, or one at two placements, compared over a text on a device: what is written is removed after its use.

Log-probabilities are large: those of a base are kept while its comparisons are done, and those of one other at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from moelib.audit import record
from moelib.base import files
from moelib.catalogue.facts import DeviceFacts, HostFacts, Manifest
from moelib.engine.client import RunError
from moelib.engine.engine import Engine, EngineError
from moelib.machine import process
from moelib.measure import device
from moelib.measure.llama_server import OUT_OF_MEMORY, LlamaServer
from moelib.models.quantize import Quantised
from moelib.quality import checks, comparison, passes, score
from moelib.quality.comparison import Comparison, Found, Side, Spec
from moelib.quality.logprobs import LogProbs, LogProbsError
from moelib.quality.passes import How, Pass

SPARE_BYTES = 64 << 20  # for logs, and the values of tokens
Files = Callable[[str], Quantised]
"""The file of a quant, or the unquantised one, made if it is not there."""


class _Written(NamedTuple):
    file: Quantised
    logprobs: LogProbs
    done: Pass


@dataclass(frozen=True)
class Place:
    """What records share that are made beside runs."""

    folder: Path
    """Of the study: records go below it."""
    llama: Engine
    where: device.Device
    device: DeviceFacts
    host: HostFacts
    work: Path

    def facts(self, run_id: str, attempt: int) -> dict[str, Any]:
        """Of a record that begins: failed, until something was found."""
        return {
            "run_id": run_id,
            "attempt": attempt,
            "status": "failed",
            "reasons": (),
            "message": None,
            "engine": LlamaServer(self.llama).facts(),
            "device": self.device,
            "host": self.host,
            "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "found": None,
            "audit": (),
            "raw": {},
        }


class Desk(Place):
    """Where comparisons are made."""

    def compare(self, base: Side, specs: Sequence[tuple[Spec, int]], file: Files, text: Path) -> Iterator[Comparison]:
        """Do comparisons of one base over one text, (what, which attempt) each; every one becomes a record.

        Raises FileError where the disk does not hold two sets of log-probabilities, and what making a file does.
        """
        one, of = specs[0][0], file(base.quant)
        vocabulary = next(t.shape[1] for t in of.header.tensors if t.name == "token_embd.weight")
        wanted = passes.need_bytes(one.context, vocabulary, one.chunks) + SPARE_BYTES
        files.need_space(self.work, wanted, f"comparing {one.model} over {one.corpus}")
        path = self.work / "base.logprobs"
        try:
            try:
                begun: _Written | process.ProcessError | EngineError = self._write(base, of, one, text, path)
            except (process.ProcessError, EngineError) as err:
                begun = err
            for spec, attempt in specs:
                other = file(spec.other.quant)
                yield self._recorded(spec, attempt, of, other, begun, text)
        finally:
            path.unlink(missing_ok=True)

    def _write(self, side: Side, of: Quantised, spec: Spec, text: Path, into: Path) -> _Written:
        """Raises RunError, ProcessError, EngineError."""
        try:
            with self.where.session(self.llama, self.work) as session:
                how = How(text, spec.context, spec.chunks, session, self.where.threads, self.work)
                written, done = passes.write(self.llama, of.path, side.placed, how, into)
        except device.DeviceError as err:
            raise RunError("engine-unusable", str(err)) from None
        except RunError:
            log = self.work / f"{into.stem}.log"
            if log.is_file() and OUT_OF_MEMORY.search(log.read_text(encoding="utf-8", errors="replace")):
                hint = "set `placement: cpu-moe` under `quality` in the study"
                raise RunError("out-of-memory", f"{of.path.name} does not fit at {side.placed}: {hint}") from None
            raise
        if of.content.sha256() != of.manifest["sha256"]:
            raise RunError("file-changed", f"{of.path.name} is no longer the file of its manifest: make it again")
        return _Written(of, written, done)

    def _recorded(
        self,
        spec: Spec,
        attempt: int,
        base: Quantised,
        other: Quantised,
        begun: _Written | process.ProcessError | EngineError,
        text: Path,
    ) -> Comparison:
        name = comparison.run_id(spec, attempt)
        made = Comparison(
            spec=spec,
            base=Manifest.model_validate(base.manifest),
            other=Manifest.model_validate(other.manifest),
            **self.facts(name, attempt),
        )
        path = self.work / "other.logprobs"
        try:
            if not isinstance(begun, _Written):
                raise begun
            found, scores, logs = self._found(spec, begun, other, text, path)
            audit = checks.of(spec, found, tuple(begun.file.header.type_counts), scores)
            failed = tuple(c.id for c in audit if c.failed)
            raw = self._kept(name, logs, (base, other)) | comparison.keep_tokens(self.folder, name, scores)
            changes = {"status": "invalid" if failed else "valid", "reasons": failed, "found": found, "audit": audit}
            made = made.model_copy(update=changes | {"raw": raw})
        except process.ProcessError as err:
            made = self._failed(made, err.reason, err, (base, other))
        except LogProbsError as err:
            made = self._failed(made, "not-a-number", err, (base, other))
        except (EngineError, device.DeviceError) as err:
            made = self._failed(made, "engine-unusable", err, (base, other))
        finally:
            path.unlink(missing_ok=True)
        return comparison.write(self.folder, made)

    def _failed(self, made: Comparison, reason: str, err: Exception, of: Sequence[Quantised]) -> Comparison:
        logs = sorted(self.work.glob("*.log"))
        raw = self._kept(made.run_id, logs, of)
        return made.model_copy(update={"reasons": (reason,), "message": str(err)[:2000], "raw": raw})

    def _found(
        self, spec: Spec, begun: _Written, other: Quantised, text: Path, path: Path
    ) -> tuple[Found, score.Scores, tuple[Path, ...]]:
        began = time.monotonic()
        written = self._write(spec.other, other, spec, text, path)
        scores = score.compare(begun.logprobs, written.logprobs)
        told, ran = None, [begun.done, written.done]
        if spec.kind == "quality":  # placements are compared by their logits alone
            with self.where.session(self.llama, self.work) as session:
                how = How(text, spec.context, spec.chunks, session, self.where.threads, self.work)
                told, done = passes.compare(self.llama, other.path, spec.other.placed, how, begun.logprobs)
            ran.append(done)
        found = Found(
            tokens_sha256=begun.logprobs.sha256_of_tokens,
            vocabulary=begun.logprobs.vocabulary,
            scored=scores.kld.shape[1],
            chunks=score.Chunks.of(scores),
            tails=score.tails(scores),
            tool=told,
            argv=tuple(p.argv for p in ran),
            seconds=round(time.monotonic() - began, 3),
        )
        return found, scores, tuple(log for p in ran for log in p.logs)

    def _kept(self, name: str, logs: Sequence[Path], of: Sequence[Quantised]) -> dict[str, str]:
        private = [*(q.path.parent for q in of), self.llama.folder, self.work]
        return record.keep_logs(self.folder / comparison.FOLDER, name, logs, private)
