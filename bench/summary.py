"""The tables at the end of `pytest bench/ --benchmark-only`: prices, memory, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from contestants import FLOOR, LORA, NAMES, OURS
from goals import goals
from interleave import summary
from judging import MET
from operators import BOTH
from results import Results, Row

LABEL_WIDTH = 36
COLUMN_WIDTH = 15


def lines(results: Results, width: int) -> Iterator[str]:
    """Yield the lines of the summary.

    Args:
        results: the results of the session.
        width: columns of the terminal; tables of more shapes are split.
    """
    every = [group for group, direction in results.groups("layer") if direction == BOTH]
    n = max(1, (width - LABEL_WIDTH) // COLUMN_WIDTH)
    for start in range(0, len(every), n):
        groups = every[start : start + n]
        yield from _table(results, "time over the frozen layer", groups, _overhead, NAMES)
        yield from _table(
            results, "time of LoRA r=16", groups, lambda row: _of_lora(results, row), (*OURS,)
        )
        yield from _table(results, "kept for backward / peak, MiB", groups, _memory, NAMES)
    for group, direction in results.groups("model"):
        yield f"{group}, {direction}: time of the first"
        for row in results.table(group, direction):
            yield f"  {row.info['label']:<{LABEL_WIDTH - 2}}{row.info['ratio']:>{COLUMN_WIDTH}.3f}"
        yield ""
    judged = goals(results)
    for goal in judged:
        yield f"{goal.verdict}: {goal.text}"
        if goal.verdict != MET:
            yield f"    {goal.measured}"
    if not judged:
        yield "No verdict: each needs more than what was measured."


def _table(
    results: Results,
    title: str,
    groups: Sequence[str],
    cell: Callable[[Row], str],
    names: Sequence[str],
) -> Iterator[str]:
    yield f"{title:<{LABEL_WIDTH}}" + "".join(f"{group:>{COLUMN_WIDTH}}" for group in groups)
    for name in names:
        rows = [results.find(group, BOTH, name) for group in groups]
        label = next((row.info["label"] for row in rows if row is not None), None)
        if label is not None:
            cells = ("" if row is None else cell(row) for row in rows)
            yield f"  {label:<{LABEL_WIDTH - 2}}" + "".join(f"{c:>{COLUMN_WIDTH}}" for c in cells)
    yield ""


def _overhead(row: Row) -> str:
    if row.name == FLOOR:
        return f"{1e3 * row.stats['median']:.2f} ms"
    return f"{100 * row.info['overhead']:+.1f} %"


def _of_lora(results: Results, row: Row) -> str:
    lora = results.find(row.group, BOTH, LORA)
    both = sorted(row.by_round.keys() & lora.by_round.keys()) if lora is not None else []
    return f"{summary([row.by_round[r] / lora.by_round[r] for r in both])[0]:.2f}" if both else ""


def _memory(row: Row) -> str:
    return " / ".join(f"{row.info[k] / 2**20:.1f}" for k in ("saved_bytes", "peak_bytes"))
