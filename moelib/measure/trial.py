"""Trial of a build of llama.cpp before it is used: whether its tools quantise, load and compute on this machine."""

import tempfile
from pathlib import Path

from moelib.catalogue import params
from moelib.catalogue.placement import Placement
from moelib.engine import engine
from moelib.gguf import twin
from moelib.machine import probe, process
from moelib.measure import device
from moelib.measure.llama_server import LlamaServer
from moelib.measure.runner import Job

TRIAL_S = 60.0  # for each step; they take about a second
MODEL, SCALE, QUANT, CONTEXT = "deepseek-moe-16b", "nano", "Q8_0", 256
PROMPT = [1, 292, 294, 296, 269]


def run(llama: engine.Engine, backend: str) -> None:
    """Quantise the smallest twin, load it with its experts on the CPU and the rest on a device, ask for a token.

    The device is llama.cpp's RPC server, and also the GPU where `backend` begins with cuda. Raises EngineError with the
    step that failed. Takes some seconds; every step has a time limit, and all files are removed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="moelib-trial-") as scratch:
            work = Path(scratch)
            twin.write(work / "f16.gguf", params.model(MODEL).at_scale(SCALE))
            argv = [llama.tool("llama-quantize"), str(work / "f16.gguf"), str(work / "model.gguf"), QUANT, "1"]
            answer = probe.ask(argv, process.patience(TRIAL_S))
            if answer.code:
                raise engine.EngineError(f"llama-quantize ended with {answer.code}: {answer.text[-300:]}")
            for where in (device.Loopback(), *([device.Cuda()] if backend.startswith("cuda") else [])):
                _serve(llama, where, work)
    except probe.ProbeError as err:
        raise engine.EngineError(f"llama-quantize {err}") from None
    except (process.ProcessError, device.DeviceError) as err:
        raise engine.EngineError(str(err)) from None


def _serve(llama: engine.Engine, where: device.Device, work: Path) -> None:
    with where.session(llama, work) as session:
        if where.kind == "cuda" and not any(name.startswith("CUDA") for name in llama.devices()):
            raise engine.EngineError("it lists no CUDA device: the driver does not fit, or its libraries are missing")
        job = Job(work / "model.gguf", Placement.parse("cpu-moe"), CONTEXT, where.threads)
        with LlamaServer(llama).start(job, session, work) as server, server.serving(process.patience(TRIAL_S)):
            if not any(p is not None for p in server.likeliest(PROMPT)):
                raise engine.EngineError("the log-probabilities that it computes are not numbers")
