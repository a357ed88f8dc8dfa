"""Memory and communication of published models on many GPUs, as the tables of docs/scaling.md.

    python -m finetune.plan.scaling [--processes 8 64 512] [--node 300] [--network 25] [--rate 400]

Denoiser alone, without activations. All in GB (10^9 bytes) and seconds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence

from torch import nn

from finetune.engines.fsdp_units import units_of
from finetune.plan.held import held
from finetune.plan.launches import Launch, launches
from finetune.plan.published import DENOISERS, denoiser
from finetune.plan.traffic import Traffic, traffic
from finetune.plan.weights import FLOAT, Weight, bytes_of, trains

ADAM = 8  # bytes that AdamW remembers of a weight
RANK = 16
ATTENTION = re.compile(r".*\.(to_q|to_k|to_v|to_out\.0)")
KINDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
HALF = 2  # bytes of a frozen weight in bfloat16
GIGA = 10**9
PROCESSES, NODE, NETWORK, RATE = (8, 64, 512), 300.0, 25.0, 400.0  # GB/s, GB/s, 10^12 operations a second


def full(network: nn.Module) -> list[Weight]:
    """All of a denoiser trains, in float32."""
    return [Weight(shape, FLOAT, "denoiser", unit=unit) for shape, unit in _tensors(network)]


def adapter(network: nn.Module) -> list[Weight]:
    """A LoRA on query, key, value and output of every attention; the denoiser is frozen in bfloat16."""
    homes = {id(part): str(number) for number, unit in enumerate(units_of(_inside(network))) for part in unit.modules()}
    pairs = [
        Weight(shape, FLOAT, "lora", unit=homes.get(id(layer)))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and ATTENTION.fullmatch(name)
        for shape in ((RANK, layer.in_features), (layer.out_features, RANK))
    ]
    return pairs + [Weight(shape, HALF, unit=unit) for shape, unit in _tensors(network)]


def seconds(sent: Traffic, processes: int, node: float, network: float) -> float:
    """At so many GB/s between two GPUs of a machine, and for each GPU between machines of eight.

    A ring passes through the slowest link there is.
    """
    return sent.sent(processes) / (GIGA * (node if processes <= 8 else network))


def memory_table(weights: dict[str, list[Weight]], processes: Sequence[int]) -> Iterator[str]:
    """GB that a process holds with each profile; with the most that ZeRO-3 and FSDP2 have gathered at a time."""
    known = launches()
    yield f"| | trains | processes | {' | '.join(KINDS)} |"
    yield "| --- " * (3 + len(KINDS)) + "|"
    for name, tensors in weights.items():
        states = 2 * bytes_of(tensors, trains)
        for world in processes:
            cells = [f"{held(tensors, known[kind], world, states).device / GIGA:.2f}" for kind in KINDS]
            yield f"| {name} | {_billions(tensors)} | {world} | {' | '.join(cells)} |"


def traffic_table(
    weights: dict[str, list[Weight]], processes: Sequence[int], node: float, network: float
) -> Iterator[str]:
    """GB that a process sends in a step on the most processes, and the seconds on each number of them."""
    known = launches()
    yield f"| | {' | '.join(f'{kind}: GB, seconds' for kind in KINDS)} |"
    yield "| --- " * (1 + len(KINDS)) + "|"
    for name, tensors in weights.items():
        cells = [_sent(tensors, known[kind], processes, node, network) for kind in KINDS]
        yield f"| {name} | {' | '.join(cells)} |"


def share_table(
    weights: dict[str, list[Weight]], operations: dict[str, float], processes: int, network: float, rate: float
) -> Iterator[str]:
    """From how many pictures a process and step on computing takes longer than sending."""
    known = launches()
    yield f"| | {' | '.join(KINDS)} |"
    yield "| --- " * (1 + len(KINDS)) + "|"
    for name, tensors in weights.items():
        if name in operations:
            picture = operations[name] / rate  # seconds
            times = [seconds(traffic(tensors, known[kind], processes), processes, network, network) for kind in KINDS]
            yield f"| {name} | {' | '.join(f'{time / picture:.2g}' for time in times)} |"


FULL_STEP = {"SD 1.5": 2.41, "SDXL": 20.23, "SD 3 medium": 25.31, "FLUX.1 dev": 223.1}
"""10^12 operations of a forward and backward pass of a picture, of 512 pixels for SD 1.5 and 1024 for others, counted
on skeletons as two for a multiplication and addition."""
LORA_STEP = {"SD 1.5": 1.72, "SDXL": 14.19, "SD 3 medium": 19.59, "FLUX.1 dev": 163.9}


def _tensors(network: nn.Module) -> Iterator[tuple[tuple[int, ...], str | None]]:
    homes: dict[int, str] = {}
    for number, unit in enumerate(units_of(_inside(network))):
        for parameter in unit.parameters():
            homes.setdefault(id(parameter), str(number))
    yield from ((tuple(one.shape), homes.get(id(one))) for one in network.parameters())


def _inside(network: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"denoiser": network})


def _billions(tensors: Sequence[Weight]) -> str:
    numbers = bytes_of(tensors, trains) / FLOAT
    return f"{numbers / GIGA:.2f} B" if numbers >= GIGA / 2 else f"{numbers / 10**6:.1f} M"


def _sent(tensors: Sequence[Weight], launch: Launch, processes: Sequence[int], node: float, network: float) -> str:
    times = [seconds(traffic(tensors, launch, world), world, node, network) for world in processes]
    sent = traffic(tensors, launch, processes[-1]).sent(processes[-1]) / GIGA
    return f"{sent:.3g}: {', '.join(f'{time:.2g}' for time in times)}"


def tables(
    processes: Sequence[int] = PROCESSES, node: float = NODE, network: float = NETWORK, rate: float = RATE
) -> str:
    """All of them, in Markdown."""
    networks = {name: denoiser(name) for name in DENOISERS}
    whole = {name: full(one) for name, one in networks.items()}
    adapters = {name: adapter(one) for name, one in networks.items()}
    most = processes[-1]
    parts = [
        ("Full fine-tuning: GB per process", memory_table(whole, processes)),
        (f"LoRA of rank {RANK}: GB per process", memory_table(adapters, processes)),
        ("Full fine-tuning: sent per process and step", traffic_table(whole, processes, node, network)),
        (f"LoRA of rank {RANK}: sent per process and step", traffic_table(adapters, processes, node, network)),
        (f"Full fine-tuning on {most}: pictures", share_table(whole, FULL_STEP, most, network, rate)),
        (f"LoRA of rank {RANK} on {most}: pictures", share_table(adapters, LORA_STEP, most, network, rate)),
    ]
    return "\n\n".join("\n".join([f"**{title}**", "", *lines]) for title, lines in parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.plan.scaling", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--node", type=float, default=NODE, help="GB/s that a GPU sends to another of its machine")
    parser.add_argument("--network", type=float, default=NETWORK, help="GB/s that a GPU sends to another machine")
    parser.add_argument("--rate", type=float, default=RATE, help="10^12 operations a second that a GPU gets done")
    asked = parser.parse_args(arguments)
    print(tables(asked.processes, asked.node, asked.network, asked.rate))


if __name__ == "__main__":
    main()
