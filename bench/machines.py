"""Names of the machines that were measured. They are headings of pages and folders of results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from boft_ops._runtime.device import slug

LINES = ("AMD EPYC", "AMD Ryzen", "Intel Xeon", "Intel Core")
# Vendor, family, models, generation; the first row that fits counts.
GENERATIONS = (
    ("AMD", 23, range(48), "Zen"),
    ("AMD", 23, range(48, 256), "Zen 2"),
    ("AMD", 25, range(16, 32), "Zen 4"),
    ("AMD", 25, range(96), "Zen 3"),
    ("AMD", 25, range(96, 256), "Zen 4"),
    ("AMD", 26, range(256), "Zen 5"),
    ("Intel", 6, (85,), "Skylake to Cooper Lake"),
    ("Intel", 6, (106, 108), "Ice Lake"),
    ("Intel", 6, (143,), "Sapphire Rapids"),
    ("Intel", 6, (173, 174), "Granite Rapids"),
    ("Intel", 6, (207,), "Emerald Rapids"),
)


def machine_name(facts: Mapping[str, Any]) -> str:
    """Name a machine by its GPU, else by the line and generation of its CPU.

    Virtual machines often hide the exact model of a CPU, but not its family.

    Args:
        facts: ``device`` and ``cpu`` as environment.describe gives them.
    """
    return cpu_kind(facts["cpu"]) if facts["device"] == "cpu" else facts["device"]


def cpu_kind(cpu: str) -> str:
    """Shorten the description of a CPU, such as "AMD EPYC (family 26, model 2)".

    Returns:
        Line and generation, such as "AMD EPYC (Zen 5)". A description without a known line or
        family is returned as it is.
    """
    plain = re.sub(r"\((R|TM)\)", "", cpu)
    line = next((line for line in LINES if plain.startswith(line)), None)
    found = re.search(r"\(family (\d+), model (\d+)\)$", plain)
    if line is None or found is None:
        return cpu
    family, model = map(int, found.groups())
    for vendor, its_family, models, generation in GENERATIONS:
        if plain.startswith(vendor) and family == its_family and model in models:
            return f"{line} ({generation})"
    return cpu


def folder_name(facts: Mapping[str, Any]) -> str:
    """Name the folder below bench/results that holds the results of a machine."""
    return slug(machine_name(facts))
