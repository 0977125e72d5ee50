"""Why a run's device memory is not known, or not known for certain: a closed list, each reason with its severity."""

CONTRADICTIONS = {
    "no-samples": "nothing was read of the run's memory",
    "gpu-lost": "the driver lost the GPU",
    "unstable-baseline": "the idle device's memory was moving before the run, and no account of the run "
    "holds all the same",
    "not-returned": "the device's memory did not come back to its idle state after the run, and no "
    "account of the run holds all the same",
    "foreign-changed": "another process came to the device, left it or grew on it while the run lasted, and the "
    "driver's list does not tell its memory from the run's",
    "accounts-disagree": "the process list and the device's growth differ by more than 64 MiB and 1 %, page tables of "
    "pinned host memory left aside",
    "below-engine-buffers": "less was read than a context and what buffers the engine says it holds",
    "below-header-weights": "less was read than the weights that the file's header puts on the device",
    "above-ceiling": "more was read than the engine's buffers and a context can explain",
}
"""Reason -> what it says, of those that make a run's memory invalid: accounts contradict each other, or something
disturbed them. Records follow the order."""
DOUBTS = {
    "no-device": "the run had no device, so it has no device memory",
    "process-not-listed": "the driver lists no process of the run, so its share of the device's growth is not known; "
    "in a container, share the host's process ids",
    "list-unsupported": "the driver could not list processes, so the run's share of the device's growth is not known",
    "host-pid": "the driver lists the run's process by the host's id; it is known by coming and going with the run",
    "bytes-not-listed": "the driver lists the run's process without its bytes; the value is the device's growth, where "
    "the run was alone on it and pinned too little host memory for its page tables to matter. Programs that are not "
    "listed, as those of Windows under WSL2, may be in it: `bound_bytes` says how far it may be off",
    "device-total-unknown": "the device's own total could not be read; the value is the process list's alone",
    "foreign-process": "another process that can compute was on the device: the list tells its memory from the run's, "
    "and its work may have slowed the run",
    "engine-silent": "the engine reported no buffers to hold the value against",
    "context-unmeasured": "the size of an empty context could not be measured; a wide bound was used",
    "sampled-peak": "the system keeps no peak; the value is the highest sample",
    "memory-shared": "the device's memory is the host's RAM, and its total counts what the whole host uses; the value "
    "is the process list's alone",
    "unseen-change": "the device's memory moved, before the run or over it, by more than the driver's list explains; "
    "the accounts agree all the same, or `bound_bytes` says how far the value may be off",
    "buffers-unknown": "the engine reported a buffer of a name that is not known to be a device's or the host's, so "
    "there is no sum of its device buffers to hold the value against",
}
"""Those that make it degraded: an account is missing; there is a value where what is left still proves it."""
REASONS = CONTRADICTIONS | DOUBTS
INVALID = tuple(CONTRADICTIONS)
