"""The committed results, machine by machine. All figures of the pages come from here."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from contestants import FLOOR, Shape
from decide import lines as files
from decide.page import FILE as DECIDED
from decide.page import commit_of, environment_of
from interleave import ratios, summary
from machines import machine_name
from operators import BOTH
from results import Results

FACTS = "environment.json"  # facts of a machine beside its results; no result itself
LAYERS, DEVICE, MODEL = "layers", "steps", "model"  # sections of gpu_decide.py
PEFT_MODEL, INDEXED = "models/peft.json", "indexed.csv"
Quartiles = tuple[float, float, float]  # the median, the lower and the upper quartile


@dataclass
class Machine:
    """Results of one machine.

    Attributes:
        name: machine_name of it.
        device: "cpu" or the name of the GPU.
        folder: folder of its files.
        runs: runs of bench/run.py, by file name.
        decided: lines of a run of gpu_decide.py, or [].
    """

    name: str
    device: str
    folder: Path
    runs: list[Results]
    decided: list[dict[str, Any]]

    @property
    def on_cpu(self) -> bool:
        """True if the measured device is a CPU."""
        return self.device == "cpu"

    @property
    def main(self) -> Results | None:
        """The run with the package's kernels, in the dtype that its charts show."""
        return next((run for run in self.runs if run.is_main), None)

    @cached_property
    def steps(self) -> dict[str, dict[str, dict[int, float]]]:
        """Training steps of one layer: shape -> contestant -> round -> seconds.

        Where gpu_decide.py measured them, its times count, because that run is the later one.
        """
        found: dict[str, dict[str, dict[int, float]]] = {}
        for figure in self._decided_layers():
            found.setdefault(figure.part, {})[figure.name] = figure.by_round
        if found or self.main is None:
            return found
        for group, direction in self.main.groups("layer"):
            if direction == BOTH:
                rows = self.main.table(group, direction)
                found[group] = {row.name: row.by_round for row in rows}
        return found

    def _decided_layers(self) -> list[files.Figure]:
        figures = files.figures(self.decided)
        return [f for f in figures if f.section == LAYERS and f.unit == "s"]

    def ratio(self, shape: Shape, name: str, to: str = FLOOR) -> Quartiles | None:
        """Divide the times of two contestants round by round; None if one was not measured."""
        times = self.steps.get(str(shape), {})
        if name not in times or to not in times:
            return None
        return summary(ratios(times, name, to))

    def device_alone(self, name: str, to: str) -> dict[str, Quartiles | None]:
        """Divide the times of the device without the host, by shape; {} if not measured."""
        parts: dict[str, dict[str, files.Figure]] = {}
        for figure in files.figures(self.decided):
            if figure.section == DEVICE:
                parts.setdefault(figure.part, {})[figure.name] = figure
        both = {p: found for p, found in parts.items() if {name, to} <= found.keys()}
        return {part: summary(found[name].ratios(found[to])) for part, found in both.items()}

    def models(self, name: str, to: str) -> dict[str, Quartiles]:
        """Divide the times of a training step of whole models, by model."""
        parts: dict[str, dict[str, dict[int, float]]] = {}
        for figure in files.figures(self.decided):
            if figure.section == MODEL:
                parts.setdefault(figure.part, {})[figure.name] = figure.by_round
        if not parts and self.main is not None:
            for row in self.main.rows:
                if row.suite == MODEL:
                    parts.setdefault(row.group, {})[row.name] = row.by_round
        both = {p: found for p, found in parts.items() if {name, to} <= found.keys()}
        return {part: summary(ratios(found, name, to)) for part, found in both.items()}

    @property
    def dtype(self) -> str:
        """Name of the dtype of ``steps`` in words."""
        if self._decided_layers():
            return environment_of(self.decided)["dtype"]
        return {"fp32": "float32", "bf16": "bfloat16"}[self.main.machine["dtype"]]

    def memory_note(self) -> str:
        """Name the commit that measured the memory, if it is not that of ``steps``; else ""."""
        if self.main is None or not self._decided_layers():
            return ""
        commit = (self.main.commit["id"] or "unknown")[:9]
        return f"Measured at an earlier commit than the times, {commit}."

    def memory(self, shape: Shape, name: str) -> tuple[int, int] | None:
        """Bytes saved for backward, and peak of a step; None if they were not measured."""
        row = None if self.main is None else self.main.find(str(shape), BOTH, name)
        return None if row is None else (row.info["saved_bytes"], row.info["peak_bytes"])

    def source(self) -> str:
        """Name software, commit and date of ``steps``."""
        if self._decided_layers():
            facts = environment_of(self.decided)
            commit, date = commit_of(self.decided, LAYERS), ""
        else:
            facts, run = self.main.machine, self.main
            commit, date = run.commit["id"], f", {run.date}"
        where = f"{facts['threads']} threads, " if facts["device"] == "cpu" else ""
        where += f"torch {facts['torch']}, PEFT {facts['peft']}"
        return f"{self.name}: {self.dtype}, {where}, commit {(commit or 'unknown')[:9]}{date}"


def load(folder: Path) -> list[Machine]:
    """Read all results below a folder: CPUs first, then by name."""
    machines = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        runs = [Results.load(p) for p in sorted(path.glob("*.json")) if p.name != FACTS]
        decided = files.read(path / DECIDED) if (path / DECIDED).exists() else []
        if runs or decided:
            facts = environment_of(decided) if decided else runs[0].machine
            machines.append(Machine(machine_name(facts), facts["device"], path, runs, decided))
    return sorted(machines, key=lambda machine: (not machine.on_cpu, machine.name))


def peft_models(machines: Sequence[Machine]) -> list[tuple[Machine, dict[str, Any]]]:
    """Read the results of bench/peft_model.py, of each machine that has them."""
    paths = [(machine, machine.folder / PEFT_MODEL) for machine in machines]
    return [(machine, json.loads(path.read_text())) for machine, path in paths if path.exists()]


def indexed(machines: Sequence[Machine]) -> list[tuple[Machine, list[dict[str, str]]]]:
    """Read the results of bench/indexed.py, of each machine that has them."""
    found = []
    for machine in machines:
        path = machine.folder / INDEXED
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
            found.append((machine, list(csv.DictReader(lines))))
    return found
