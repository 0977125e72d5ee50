"""The runner that a study names, and the device that it can use."""

from collections.abc import Mapping

from moelib.catalogue import params
from moelib.catalogue.facts import ENDPOINT, LLAMA_SERVER, SHIMMY
from moelib.engine.engine import Engine
from moelib.measure import device
from moelib.measure.device import Device, DeviceError, NoDevice
from moelib.measure.llama_server import LlamaServer
from moelib.measure.runner import Runner
from moelib.runners import endpoint, generate, shimmy


def of(name: str, llama: Engine, endpoints: Mapping[str, endpoint.Address] | None = None) -> Runner:
    """The runner of a study; endpoints: of each placement, the server that has it. Raises ShimmyError where it is not
    here, EndpointError where no address is given."""
    if name == LLAMA_SERVER:
        return LlamaServer(llama)
    if name == ENDPOINT:
        return endpoint.Endpoint(endpoints or {}, llama)
    return (shimmy.ShimmyServe if name == SHIMMY else generate.ShimmyGenerate)(shimmy.find(), llama)


def of_study(parameters: params.Study, llama: Engine) -> Runner:
    """The runner of a study, at the addresses that it names."""
    return of(parameters.runner, llama, endpoint.addresses(parameters.endpoints))


def device_for(runner: Runner, kind: str, llama: Engine) -> Device:
    """The device of a study's runs. shimmy has no device but a GPU: without one all is in RAM at any placement.

    Raises DeviceError for a device that is named and that the runner cannot use.
    """
    if isinstance(runner, endpoint.Endpoint):
        if kind == "loopback":
            raise DeviceError("an endpoint has its own devices: write `device: auto`, which is the GPU here or none")
        return _seen(runner, kind)
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


def _seen(runner: endpoint.Endpoint, kind: str) -> Device:
    """The GPU here, for a server of this machine, else none: memory is then that of its process in RAM."""
    if kind == "cuda" or (kind == "auto" and runner.here):
        try:
            return device.Cuda()
        except DeviceError:
            if kind == "cuda":
                raise
    where = NoDevice()
    where.note = "measures what the endpoint's process has in RAM: no GPU is seen here"
    return where
