"""The runner that a study names, and the device that it can use."""

from moelib.catalogue.facts import LLAMA_SERVER, SHIMMY
from moelib.engine.engine import Engine
from moelib.measure import device
from moelib.measure.device import Device, DeviceError, NoDevice
from moelib.measure.llama_server import LlamaServer
from moelib.measure.runner import Runner
from moelib.runners import generate, shimmy


def of(name: str, llama: Engine) -> Runner:
    """The runner of a study. Raises ShimmyError where it is not here."""
    if name == LLAMA_SERVER:
        return LlamaServer(llama)
    return (shimmy.ShimmyServe if name == SHIMMY else generate.ShimmyGenerate)(shimmy.find(), llama)


def device_for(runner: Runner, kind: str, llama: Engine) -> Device:
    """The device of a study's runs. shimmy has no device but a GPU: without one all is in RAM at any placement.

    Raises DeviceError for a device that is named and that the runner cannot use.
    """
    if not isinstance(runner, shimmy.ShimmyServe | generate.ShimmyGenerate):
        return device.choose(kind, llama)
    if kind == "loopback":
        raise DeviceError("shimmy cannot use a loopback device: write `device: auto`, which is a GPU or none")
    if kind == "cuda" and not runner.shimmy.has_cuda:
        raise DeviceError(f"{runner.shimmy} was built without CUDA: `make shimmy` builds it with, where nvcc is")
    if kind != "none" and runner.shimmy.has_cuda:
        return device.Cuda()
    where = NoDevice()
    where.note = f"measures in RAM alone at any placement, because {runner.shimmy} was built for no GPU"
    return where
