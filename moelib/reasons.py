"""Why the VRAM of a run is unknown or uncertain: a closed list, each reason with its severity."""

CONTRADICTIONS = {
    "no-samples": "there is no reading of the run's VRAM",
    "gpu-lost": "the driver lost the GPU",
    "unstable-baseline": "memory use of the idle device changed before the run, and no account of the run is valid "
    "despite that",
    "not-returned": "memory use of the device did not return to its idle state after the run, and no account of the "
    "run is valid despite that",
    "foreign-changed": "another process started, ended or grew on the device during the run, and the driver's list "
    "does not separate its memory from the run's",
    "accounts-disagree": "the process list and the device's growth differ by more than 64 MiB and 1 %, apart from page "
    "tables of pinned host memory",
    "below-engine-buffers": "the reading is below an empty context plus the buffers that the engine reports",
    "below-header-weights": "the reading is below the weights that the file's header puts on the device",
    "above-ceiling": "the reading is above what the engine's buffers and a context can explain",
}
"""Reason -> meaning, of the reasons that make the VRAM invalid: accounts contradict each other, or were disturbed.
Records list reasons in this order."""
DOUBTS = {
    "no-device": "the run had no device, so it has no VRAM",
    "process-not-listed": "the driver lists no process of the run, so its share of the device's growth is unknown; in "
    "a container, share the host's process ids",
    "list-unsupported": "the driver could not list processes, so the run's share of the device's growth is unknown",
    "host-pid": "the driver lists the run's process by the host's id; it is identified because it started and ended "
    "with the run",
    "bytes-not-listed": "the driver lists the run's process without its bytes; the value is the device's growth, if "
    "the run was alone on it and pinned too little host memory for page tables to matter. Programs that are not "
    "listed, such as those of Windows under WSL2, may be included: `bound_bytes` is the largest possible error",
    "device-total-unknown": "the device's own total could not be read; the value is the process list's alone",
    "foreign-process": "another process that can compute was on the device: the list separates its memory from the "
    "run's, but its work may have slowed the run",
    "engine-silent": "the engine reported no buffers to compare the value with",
    "context-unmeasured": "the size of an empty context could not be measured; a wide bound was used",
    "sampled-peak": "the system records no peak; the value is the highest sample",
    "memory-shared": "the device's memory is the host's RAM, and its total counts what the whole host uses; the value "
    "is the process list's alone",
    "unseen-change": "memory use of the device changed before or during the run by more than the driver's list "
    "explains; the accounts agree despite that, or `bound_bytes` is the largest possible error",
    "buffers-unknown": "the engine reported a buffer whose name is known neither as a device's nor as the host's, so "
    "its device buffers have no sum to compare the value with",
}
"""Those that make it degraded: an account is missing; the value is given where the others still prove it."""
REASONS = CONTRADICTIONS | DOUBTS
INVALID = tuple(CONTRADICTIONS)
