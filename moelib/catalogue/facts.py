"""What a record says of its file, engine, device and host: strict classes, and the history of the record's schema."""

from typing import Annotated, Literal

from pydantic import Field

from moelib.base.schema import Bytes, BytesPerS, Count, Megahertz, Name, Seconds, Sha256, Watts
from moelib.catalogue.params import Strict

SCHEMA_VERSION = 3
HISTORY = {
    1: "Never committed: the first drafts.",
    2: "The first study's records. Libraries of the engine and an identity of the host were not recorded; the link's "
    "speed counted PCIe 3 and newer with the line code of PCIe 2.",
    3: "Engine: digest of every file that the server had mapped. Host: an identity that tells hosts apart. Every "
    "number has a range.",
}
"""Schema number -> what a record of it holds, and what one of the next has beside."""
OLDEST = 2


class Facts(Strict):
    """Keys that a record of an older schema lacks are None."""


class Fallback(Strict):
    """A tensor whose rows the quant's own type could not take."""

    tensor: Name
    columns: Count
    type: Name


class ImatrixFacts(Facts):
    """The importance matrix that a file was quantised with."""

    file_name: Name
    sha256: Sha256


class Manifest(Facts):
    """A quantised file as it was written, or found. A record holds it under the key `sheet`.

    None where moelib did not make the file: what it was made from, by which engine, and how long that took.
    """

    model: Name
    quant: Name
    scale: Name
    weights: Literal["twin", "real"]
    origin: Name | None = None
    """Where its source came from, or the file itself; None in the first records."""
    file_name: Name
    file_bytes: Bytes
    predicted_bytes: Bytes | None
    """By the engine's dry run, None where there was none."""
    sha256: Sha256
    """Of a split model: of its files' names and digests."""
    source_sha256: Sha256 | None
    parameters: Count
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]
    tensor_types: dict[Name, Count]
    expert_types: dict[Name, Count]
    expert_bytes: Bytes
    fallbacks: tuple[Fallback, ...]
    engine_build: Count | None
    engine_version: Name | None
    quantize_s: Seconds | None
    imatrix: ImatrixFacts | None = None
    """None in manifests of files that were quantised without one, and where moelib did not make the file."""


class Receipt(Facts):
    """A repository on a Hub, after every file of it was read back."""

    hub: Name
    """Its address."""
    here: bool
    """Whether that Hub is one on the machine that published, as in a rehearsal."""
    repository: Name
    public: bool
    at: Name
    """When it was read back, in UTC."""
    files: dict[Name, Sha256]


LLAMA_SERVER, SHIMMY, SHIMMY_GENERATE, ENDPOINT = "llama-server", "shimmy", "shimmy-generate", "endpoint"


class EngineFacts(Facts):
    """What served the model, as it was run."""

    build: Count | None
    version: Name
    server_sha256: Sha256 | None
    """Of the launcher alone; its libraries are in the observation. None for a server that was not started here."""
    runner: Annotated[str, Field(pattern=r"^[a-z0-9.-]{1,40}$")] = LLAMA_SERVER
    """By its name, what it has to tell is known (`runner.TELLS`). Records of earlier code name none."""


Link = tuple[Annotated[int, Field(ge=1, le=16)], Annotated[int, Field(ge=1, le=64)]]
"""Generation and lanes of PCI Express."""


class DeviceFacts(Facts):
    """What holds the offloaded part; all but kind, name and uuid are a GPU's, by its driver."""

    kind: Literal["cuda", "loopback", "none"]
    name: Name | None
    uuid: Name | None
    driver: Name | None = None
    total_bytes: Bytes | None = None
    context_bytes: Bytes | None = None
    """An empty context, measured."""
    bandwidth_bytes_per_s: BytesPerS | None = None
    pcie_bytes_per_s: BytesPerS | None = None
    """The most that the link carries one way."""
    pcie_link: Link | None = None
    """What card and board can do, and as it was when the run had ended: an idle link slows down."""
    pcie_link_now: Link | None = None
    power_limit_watt: Watts | None = None
    max_sm_clock_mhz: Megahertz | None = None
    """The highest that the card has; None where the driver does not say, and in records of schema 2."""


class HostFacts(Facts):
    """The machine and the code that measured."""

    cpu: Name | None
    cpus: Annotated[int, Field(ge=1, le=1 << 16)]
    ram_bytes: Bytes
    ram_read_bytes_per_s: BytesPerS | None = None
    """All usable CPUs together, before the cell's runs."""
    system: Name
    """Kernel and its release."""
    python: Name
    moelib: Name
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None
    dirty: bool | None
    host_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")] | None = None
    """Tells equal hosts from different ones, and nothing else; None in records of schema 2."""
    shared: bool | None = None
    """Whether others might measure on the host's other GPUs meanwhile; None in records of earlier code, where two
    studies on two GPUs of a host did not refuse each other."""
