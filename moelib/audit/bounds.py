"""Invariants of a run that follow from the order of time, from what the hardware can do at most, and from where the
file was when its load began.

They ask nothing of an instrument that it did not say of itself: a link's speed, a card's power limit, the host's RAM.
"""

import itertools
import math
from collections.abc import Sequence

from moelib.audit.invariants import SHOWN, Faults, Finding, Measured, holds
from moelib.audit.record import Record
from moelib.machine.pagecache import CACHED, COLD
from moelib.measure.nvml import Counters

TICK_S = 0.002  # times are kept to a tenth of a millisecond, and taken one after another
LAST_READING_S = 1.0  # before the end of the watched time: the thread wakes every 0.1 s
BOUND_SHARE = 1.0  # of the rate that reading the weights alone allows: 0.94 at most seen
CACHED_BYTES = 1 << 30  # weights below this may come from the CPU's caches, which are faster than RAM
ENERGY_S = 0.25  # the board's counter moves every 0.1 s or so
COURSE_S = 0.35  # of power that the counter may count later than it was drawn: 0.21 s seen
METER = 2.5  # a request's mean power against readings at the ends of requests: 0.73 to 2.3 of their mean seen
POWER_SHARE = 1.10  # a board steps over its limit for moments
LINK_SHARE, LINK_BYTES = 1.22, 64 << 20  # packets of 128 bytes and their heads; page tables and commands go over it too
COPIED_TOKENS = 32  # of a batch, from which on the device computes with weights that are copied to it (op-offload)
PROMPT_BATCH = 512  # tokens for which the experts are copied once (llama.cpp's ubatch)
PACKETS = 1.08
"""Bytes that the GPU's counter sees for each byte of a tensor sent over the bus, heads of packets and all: 1.076 to
1.087 in the committed runs whose prompts need all experts of the moved layers."""
MIB = 1 << 20
# Of libraries, caches and the driver, beside file and buffers: 247 to 512 MiB seen with a GPU, 2 to 25 MiB without.
RSS_BYTES = {"cuda": 2 << 30}
RSS_SMALL_BYTES = 256 << 20
RESIDENT = 0.985  # of them; 1.006 and more seen
ROOMY = 2  # times the file, of RAM: pages that were read once then stay
PAGING = 100  # page faults that wait for the disk: from here on pages come and go
READING_S = {"cuda": 1.2e-4}  # of CPU at the least, for a look at the card: 3.7e-4 seen
READING_SMALL_S = 2e-5  # for one at a process alone: 2.2e-4 seen
SM_MHZ, MEMORY_MHZ = 4000, 25000  # no card comes near
BUS_BITS = (32, 16384)  # of a memory bus, at two transfers a clock
DISK_SHARE = 0.9  # of a cold file: tensors that the engine does not use are not read; 1.00 seen


@holds("run", f"in order, the last reading within {LAST_READING_S:g} s of the end")
def one_timeline(run: Measured) -> Faults:
    """Start, load, requests, readings and end are on one clock: each comes after the one before, and inside the run."""
    o = run.observation
    during, after = ([r.t_s for r in part] for part in (o.memory.trace.during, o.memory.trace.after))
    started = o.load_s is not None or not run.lacks("process")
    if started and not (o.load_s or 0) > 0:
        yield f"load {o.load_s} s"
    marks = [("load", o.load_s or 0.0)]
    for r in o.requests:
        marks += [(f"{r.workload}[{r.index}]", r.started_s), ("its end", r.started_s + (r.total_s or 0.0))]
    marks += [("the end", o.host.elapsed_s), ("the whole run", o.wall_s)]
    for (a, s), (b, t) in itertools.pairwise(marks):
        if not s <= t + TICK_S:
            yield f"{b} at {t:.4f} s, after {a} at {s:.4f} s"
    for name, times, first, last in (
        ("readings", during, 0.0, o.host.elapsed_s),
        ("counters", [c.t_s for c in o.counters], 0.0, o.host.elapsed_s),
        ("readings after the end", after, during[-1] if during else 0.0, o.wall_s),
    ):
        order = [first, *times, last + TICK_S]
        if any(not a <= b for a, b in itertools.pairwise(order)):
            yield f"{name} not in order between {first:.2f} and {last:.2f} s"
    if during and o.host.elapsed_s - during[-1] > LAST_READING_S:
        yield f"nothing was read in the last {o.host.elapsed_s - during[-1]:.2f} s"
    return f"{len(o.requests)} requests in {o.host.elapsed_s:.2f} s"


def memory_bound(run: Measured, rate: float) -> float | None:
    """Seconds that reading a token's weights at full speed takes, times the rate; None where a speed is not known."""
    placement = run.observation.placement
    device, host = run.device.bandwidth_bytes_per_s, run.host.ram_read_bytes_per_s
    in_ram = placement.host_read_bytes if placement.moved_bytes >= CACHED_BYTES else 0
    on_card = placement.device_read_bytes if run.observation.device_kind == "cuda" else 0
    if (on_card and not device) or (in_ram and not host):
        return None
    return rate * ((on_card / device if device else 0.0) + (in_ram / host if host else 0.0))


@holds("run", f"{BOUND_SHARE:.0%} of the rate that reading the weights alone allows")
def below_memory_bound(run: Measured) -> Finding:
    """No token comes sooner than the weights that it needs can be read from where they lie."""
    shares = [(r, memory_bound(run, r.tps)) for r in run.observation.requests if r.tps]
    if not shares and run.lacks("tokens") and run.lacks("usage"):
        return None, f"no rate is known: {run.runner} does not report how many tokens came"
    known = [(r, share) for r, share in shares if share is not None]
    over = [f"{r.workload}[{r.index}]: {share:.0%}" for r, share in known if share > BOUND_SHARE]
    return not over, "; ".join(over[:SHOWN]) or f"{max((s for _, s in known), default=0.0):.0%} at most"


@holds("run", f"power limit x (time + {ENERGY_S:g} s), and the counter's own course")
def energy_possible(run: Measured) -> Faults:
    """A request takes no more energy than the board may draw while it lasts, and what the board's counter says."""
    limit, counters = run.device.power_limit_watt, run.observation.counters
    total = [c.energy_joule for c in counters if c.energy_joule is not None]
    if any(b < a for a, b in itertools.pairwise(total)):
        yield "the counter ran backwards"
    for c in counters:
        if c.power_watt is not None and limit and not 0 < c.power_watt <= 1.5 * limit:
            yield f"{c.power_watt} W on a board of {limit} W"
    for r in run.observation.requests:
        used = r.energy_joule
        if used is None or r.total_s is None:
            continue
        name = f"{r.workload}[{r.index}]: {used} J in {r.total_s:.3f} s"
        if used < 0 or (limit and used > POWER_SHARE * limit * (r.total_s + ENERGY_S)):
            yield f"{name} with {limit} W"
        elif (moved := course(counters, r.started_s, r.started_s + r.total_s)) is not None:
            joules, lasted = moved
            watts = max(joules / lasted, used / r.total_s, *(c.power_watt or 0.0 for c in counters))
            least = joules - watts * (lasted - r.total_s + COURSE_S)
            if not least - 1 <= used <= joules + 1:
                yield f"{name}, the counter moved by {joules:.0f} J in {lasted:.3f} s"
    spent = [r.energy_joule for r in run.observation.requests if r.energy_joule is not None]
    known = bool(spent) and len(spent) == len(run.observation.requests)
    if total and known and sum(spent) > total[-1] - total[0] + 1:
        yield f"{sum(spent):.0f} J in requests, the counter moved by {total[-1] - total[0]:.0f} J"
    drawn = [c.power_watt for c in counters if c.power_watt is not None]
    lasted = sum(r.total_s or 0.0 for r in run.observation.requests)
    if drawn and known and lasted > 1.0:
        mean = sum(spent) / lasted
        if not min(drawn) / METER <= mean <= METER * max(drawn):
            yield f"{mean:.0f} W by energy, {min(drawn):.0f} to {max(drawn):.0f} W by the board's own meter"
    return "as the board's counter says" if counters else "no counter"


def course(counters: Sequence[Counters], start_s: float, end_s: float) -> tuple[float, float] | None:
    """(joules, seconds) between two readings of the counter that enclose a time; None where there are none."""
    known = [(c.t_s, c.energy_joule) for c in counters if c.energy_joule is not None]
    before = [(t, joules) for t, joules in known if t <= start_s + TICK_S]
    after = [(t, joules) for t, joules in known if t >= end_s - TICK_S]
    if not before or not after or after[0][0] <= before[-1][0]:
        return None
    return after[0][1] - before[-1][1], after[0][0] - before[-1][0]


def weights_resident(run: Measured) -> tuple[int, bool]:
    """(bytes of weights in the server's memory, whether a mapped file's pages, counted in, surely stay there)."""
    observation = run.observation
    buffers = (b for b in observation.report.buffers if b.kind == "model" and not b.on_device)
    copied = sum(b.size_bytes for b in buffers if not b.name.endswith("_Mapped"))
    if run.spec.load_mode != "mmap":
        return copied, True
    stay = run.host.ram_bytes >= ROOMY * run.sheet.file_bytes and (observation.host.major_faults or 0) < PAGING
    return copied + run.sheet.file_bytes, stay  # all of a mapped file is read


@holds(
    "run",
    "host buffers and mapped file at the least; RAM, or these and libraries, at the most",
    partly="buffers owner",
)
def host_memory_possible(run: Measured) -> Faults:
    """The server's resident memory holds what was copied to the host, and no more than file, buffers and libraries."""
    peak, ram, silent = run.observation.host_rss_peak_bytes, run.host.ram_bytes, run.lacks("buffers")
    if peak is None:
        return "the system keeps no peak"
    weights, stay = weights_resident(run)
    least = weights if stay else weights - run.sheet.file_bytes
    # not mapped, the file is read piece by piece: how much of it at once is the engine's affair
    most = weights + RSS_BYTES.get(run.observation.device_kind, RSS_SMALL_BYTES)
    most += run.sheet.file_bytes if run.spec.load_mode != "mmap" else 0
    if not silent and peak < least * RESIDENT:
        yield f"{peak} bytes, copied buffers and a mapped file take {least}"
    if ram and peak > ram:
        yield f"{peak} bytes, RAM has {ram}"
    if not silent and peak > most:
        yield f"{peak} bytes, file, buffers and libraries take at most {most}"
    if peak <= 0:
        yield f"{peak} bytes"
    return f"{peak} bytes"


@holds(
    "run",
    f"where recorded, {CACHED:.0%} of the file; read from disks: the rest and {RSS_SMALL_BYTES >> 20} MiB "
    f"({RSS_BYTES['cuda'] >> 20} with a GPU)",
    degrades=True,
)
def file_cached(run: Measured) -> Finding:
    """Unless its placement is cold, a run loads its file from the page cache, as all others do: else its load time is
    the disk's. Where RAM cannot hold the file, no run does. Records of earlier code do not say."""
    o, size, finding = run.observation, run.sheet.file_bytes, _where_the_file_was(run)
    told = {name for name in ("cached_bytes", "disk_read_bytes") if getattr(o, name) is not None or name in o.absent}
    if len(told) == 1:
        return False, f"{finding}: one was taken out, or put in"
    if run.spec.placed.cold or o.cached_bytes is None:
        return True, "a cold one" if run.spec.placed.cold else o.absent.get("cached_bytes", "not recorded")
    most = (1 - CACHED) * size + RSS_BYTES.get(o.device_kind, RSS_SMALL_BYTES)  # the rest, and its libraries
    if size > run.host.ram_bytes:
        finding += f": RAM has {run.host.ram_bytes}"
    return CACHED * size <= o.cached_bytes <= size and (o.disk_read_bytes or 0) <= most, finding


def _where_the_file_was(run: Measured) -> str:
    cached, read = run.observation.cached_bytes, run.observation.disk_read_bytes
    return f"{cached} of {run.sheet.file_bytes} bytes were cached, {read} read from disks"


@holds("run", f"{COLD:.0%} of the file; read from disks: {DISK_SHARE:.0%} of it")
def file_cold(run: Measured) -> Finding:
    """A run with cache=cold found nothing of its file in the page cache, and its server read it from the disk."""
    o, size = run.observation, run.sheet.file_bytes
    if not run.spec.placed.cold:
        return True, "not a cold one"
    finding = _where_the_file_was(run)
    if o.cached_bytes is None or o.cached_bytes > COLD * size:
        return False, finding
    if o.disk_read_bytes is None:  # page faults do not tell: pages that were read ahead count as minor ones
        return None, f"{finding}: {o.absent.get('disk_read_bytes', 'not recorded')}"
    return o.disk_read_bytes >= DISK_SHARE * size, finding


@holds("run", "the card's memory")
def device_memory_possible(run: Measured) -> Finding:
    """Nothing is larger than the card that holds it."""
    total = run.device.total_bytes
    if total is None:
        return True, "the device's size is not known"
    m = run.observation.memory
    sizes = [m.value_bytes, m.process_bytes, m.growth_bytes, m.engine_bytes, m.weights_bytes, m.context_bytes]
    sizes += [r.device_bytes for r in (*m.trace.before, *m.trace.during, *m.trace.after)]
    largest = max((n for n in sizes if n is not None), default=0)
    return 0 <= largest <= total, f"{largest} of {total} bytes"


def copied_bytes(r: Record, tokens: int) -> float:
    """What the GPU's counter sees of the expert weights that llama.cpp copies for a prompt that needs all: those of the
    moved layers, once a batch; but not those of a model's last layer, which computes the last token alone."""
    placed, moved = r.spec.placed, r.observation.placement
    if not moved.moved_blocks:
        return 0.0
    layers = moved.moved_blocks - (1 if placed.is_whole else 0)
    batches = math.ceil(tokens / (placed.ubatch or PROMPT_BATCH))
    return PACKETS * (batches * moved.moved_bytes * layers / moved.moved_blocks)


@holds("run", "the link's speed, and the experts once a batch")
def bus_traffic_possible(run: Measured) -> Faults:
    """A prompt moves no more over the bus than the link carries in its time, or than experts and activations make."""
    o, link = run.observation, run.device.pcie_bytes_per_s
    for moved in o.prompt_traffic:
        name = f"{moved.workload}: {moved.received_bytes} received, {moved.sent_bytes} sent"
        batches = math.ceil(moved.prompt_tokens / (run.spec.placed.ubatch or PROMPT_BATCH))
        most = batches * (o.placement.moved_bytes * LINK_SHARE + 4 * LINK_BYTES + moved.prompt_tokens * MIB)
        took = [r.engine_prompt_s for r in o.requests if r.workload == moved.workload and r.engine_prompt_s]
        if link and took:
            most = min(most, link * (2 * max(took) + 0.1) + LINK_BYTES)
        if any(n is not None and not 0 < n <= most for n in (moved.received_bytes, moved.sent_bytes)):
            yield f"{name}, at most {most:.0f}"
    return f"{len(o.prompt_traffic)} prompts"


@holds("run", "the card's clocks, and a bus that exists")
def clocks_possible(run: Measured) -> Faults:
    """Clocks are positive and a card's; the memory's clock and the stated bandwidth give a bus that exists."""
    bandwidth = run.device.bandwidth_bytes_per_s
    highest = run.device.max_sm_clock_mhz or SM_MHZ
    memory = [c.memory_clock_mhz for c in run.observation.counters if c.memory_clock_mhz is not None]
    for c in run.observation.counters:
        if c.sm_clock_mhz is not None and not 0 < c.sm_clock_mhz <= highest:
            yield f"SM clock {c.sm_clock_mhz} MHz of {highest}"
        if c.memory_clock_mhz is not None and not 0 < c.memory_clock_mhz <= MEMORY_MHZ:
            yield f"memory clock {c.memory_clock_mhz} MHz"
    if bandwidth is not None and bandwidth <= 0:
        yield f"{bandwidth} bytes/s of device memory"
    elif bandwidth and memory and max(memory) > 0:
        bits = 8 * bandwidth / (2e6 * max(memory))
        if not BUS_BITS[0] <= bits <= BUS_BITS[1]:
            yield f"{bandwidth:.4g} bytes/s at {max(memory)} MHz is a bus of {bits:.1f} bits"
    return f"{len(run.observation.counters)} readings"


@holds("run", "CPUs x time, and more than nothing")
def cpu_time_possible(run: Measured) -> Faults:
    """CPU seconds fit the host's CPUs and the time that passed; what was never counted is unknown, not 0."""
    use, monitors = run.observation.host, run.observation.watch_cpu_s
    most = 1.1 * use.elapsed_s * use.cpus + 1.0
    if not use.elapsed_s > 0 or use.cpus < 1:
        yield f"{use.elapsed_s} s on {use.cpus} CPUs"
    for whose, spent in (("all", use.busy_s), ("the run", use.own_s)):
        if not 0 <= spent <= most:
            yield f"{whose}: {spent} CPU seconds of {most:.1f}"
    if monitors is not None and not 0 < monitors <= use.elapsed_s:
        yield f"monitors: {monitors} CPU seconds in {use.elapsed_s:.2f} s"
    readings = len(run.observation.memory.trace.during) - 1  # the last one is no monitor's: it is taken at the end
    if monitors is not None and monitors < readings * READING_S.get(run.observation.device_kind, READING_SMALL_S):
        yield f"monitors: {monitors} CPU seconds for {readings} readings"
    if any(n is not None and n < 0 for n in (use.minor_faults, use.major_faults)):
        yield f"page faults {use.minor_faults}, {use.major_faults}"
    if use.minor_faults == 0:
        yield "a server that never touched a page"
    return f"{use.own_s} of {use.busy_s} CPU seconds"
