"""Queries to CUDA, run in a separate process: in this one, CUDA would keep a context on the GPU."""

import re
import subprocess
import sys

from moelib import process

ANSWER_S = 30.0  # a driver may have to be loaded first
SHARED = "shared 1"
"""Printed by the process for a device whose memory is the host's RAM."""

# libcuda's functions are those of its header; 18 is CU_DEVICE_ATTRIBUTE_INTEGRATED.
_ASK = """
import ctypes, time, uuid
cuda, context, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_int()
name, shared, began = (ctypes.c_ubyte * 16)(), ctypes.c_int(-1), cuda.cuInit(0)
found = cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetUuid(name, device)
cuda.cuDeviceGetAttribute(ctypes.byref(shared), 18, device)
print("device", began, found, f"GPU-{uuid.UUID(bytes=bytes(name))}", "shared", shared.value, flush=True)
"""
_HOLD = """
print("context", began, cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), flush=True)
time.sleep(60)
"""
FIRST = [sys.executable, "-c", _ASK]
HOLD = [sys.executable, "-c", _ASK + _HOLD]
"""Holds an empty context on the first visible device until it is ended."""


def first_id() -> str | None:
    """The id of the device that CUDA counts first with the present environment; None where CUDA gives none."""
    limit = process.patience(ANSWER_S)
    try:
        done = subprocess.run(FIRST, env=process.inherited(), capture_output=True, timeout=limit, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    m = re.search(r"device 0 0 (GPU-\S+)", done.stdout.decode("utf-8", "replace"))
    return m[1] if m else None
