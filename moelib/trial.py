"""Trial of a build of llama.cpp before it is used: whether its tools quantise, load and compute on this machine."""

import tempfile
from pathlib import Path

from moelib import client, device, engine, params, probe, process, twin
from moelib.placement import Placement

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
                raise engine.EngineError(f"llama-quantize ended with {answer.code}: {(answer.out + answer.err)[-300:]}")
            for where in (device.Loopback(), *([device.Cuda()] if backend.startswith("cuda") else [])):
                _serve(llama, where, work)
    except probe.ProbeError as err:
        raise engine.EngineError(f"llama-quantize {err}") from None
    except (process.ProcessError, device.DeviceError) as err:
        raise engine.EngineError(str(err)) from None


def _serve(llama: engine.Engine, where: device.Device, work: Path) -> None:
    key, limit = process.new_key(), process.patience(TRIAL_S)
    with where.session(llama, work) as session:
        if where.kind == "cuda" and not any(name.startswith("CUDA") for name in llama.devices()):
            raise engine.EngineError("it lists no CUDA device: the driver does not fit, or its libraries are missing")
        argv = llama.server_argv(work / "model.gguf", Placement.parse("cpu-moe"), CONTEXT, where.threads, session.args)
        env = process.environment(work, {**session.env, "LLAMA_API_KEY": key})
        with process.Child(argv, work / "server.log", env, session.cpus) as server:
            port = next(filter(None, server.wait_for(engine.LISTENING, limit).groups()))
            with client.connect(int(port), key) as connection:
                client.check_ours(connection, work / "model.gguf")
                if not any(p is not None for p in client.top_logprobs(connection, PROMPT)):
                    raise engine.EngineError("the log-probabilities that it computes are not numbers")
