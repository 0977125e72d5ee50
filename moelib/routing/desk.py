"""A file's use of experts made into a record, on a device: counted over a text, and followed through its beginning."""

from __future__ import annotations

import time
from pathlib import Path

from moelib.audit import record
from moelib.base import files
from moelib.catalogue.facts import Manifest
from moelib.engine.client import RunError
from moelib.engine.engine import EngineError
from moelib.machine import process
from moelib.measure import device
from moelib.models.quantize import Quantised
from moelib.quality.desk import Place
from moelib.routing import checks, routed
from moelib.routing.passes import Experts, How, count
from moelib.routing.routed import Found, Routed, Spec
from moelib.routing.trace import Trace, follow

SPARE_BYTES = 16 << 20  # for logs and the trace
SUMS_BYTES = 8  # of values and of their squares, of each column of each expert's weights


class Desk(Place):
    """Where the use of experts is counted."""

    def follow(self, spec: Spec, attempt: int, of: Quantised, text: Path) -> Routed:
        """Count and follow; whatever comes of it becomes a record.

        Raises FileError where the disk does not hold what the tool writes.
        """
        columns = sum(t.shape[0] * t.shape[-1] for t in of.header.moved("cpu-moe"))
        files.need_space(self.work, SUMS_BYTES * columns + SPARE_BYTES, f"following the experts of {spec.model}")
        name = routed.run_id(spec, attempt)
        made = Routed(spec=spec, sheet=Manifest.model_validate(of.manifest), **self.facts(name, attempt))
        for log in self.work.glob("*.log"):  # of the one before
            log.unlink()
        try:
            found, trace = self._found(spec, of, text)
            audit = checks.of(spec, found, trace)
            failed = tuple(c.id for c in audit if c.failed)
            raw = routed.keep_trace(self.folder, name, trace, found.experts)
            changes = {"status": "invalid" if failed else "valid", "reasons": failed, "found": found, "audit": audit}
        except process.ProcessError as err:
            changes, raw = {"reasons": (err.reason,), "message": str(err)[:2000]}, {}
        except (EngineError, device.DeviceError) as err:
            changes, raw = {"reasons": ("engine-unusable",), "message": str(err)[:2000]}, {}
        private = [of.path.parent, text.parent, self.llama.folder, self.work]
        raw |= record.keep_logs(self.folder / routed.FOLDER, name, sorted(self.work.glob("*.log")), private)
        return routed.write(self.folder, made.model_copy(update=changes | {"raw": raw}))

    def _found(self, spec: Spec, of: Quantised, text: Path) -> tuple[Found, Trace]:
        """Raises RunError, ProcessError, EngineError, DeviceError."""
        began = time.monotonic()
        experts = Experts.in_file(of.header)
        with self.where.session(self.llama, self.work) as session:
            how = How(text, spec.placed, session, self.where.threads, self.work)
            counted = count(self.llama, of.header, how, spec.context, spec.chunks, name="counts")
            whole = count(self.llama, of.header, how, spec.tokens, name="whole")
            trace, last = follow(self.llama, of.header, how, spec.tokens)
        if of.content.sha256() != of.manifest["sha256"]:
            raise RunError("file-changed", f"{of.path.name} is no longer the file of its manifest: make it again")
        argv = (counted.argv, whole.argv, last.argv)
        seconds = round(time.monotonic() - began, 3)
        return Found(experts, counted.selections, whole.selections, argv, seconds), trace
