"""What a figure was measured on. Says nothing that names one machine among others."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from finetune import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{_processor()}, {cores} core{'s' if cores > 1 else ''}",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of this toolkit, Python and the libraries that figures depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"finetune": __version__, "python": platform.python_version(), **found}


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
