"""The page of regrets: tables and a plot of what `regret.py` judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import rules_of_thumb

from tvm_lowrank.place import SMALL, Place
from tvm_lowrank.report import svg

if TYPE_CHECKING:
    from regret import Judged

BUDGETS = (1, 2, 4)
READ = """
Read the table with this in mind: what took 15 % longer on these layers than the trained trees
expected was measured again, once or twice, and the least time kept; the constants of the analytic
level were fitted on the shipped survey for AVX-512; how many trees there are a round was settled on
its networks, how many rounds on its other shapes. The best time is the best on record; where the
best schedules of all algorithms ran in turns, these times tell the regret of the algorithm, and
the schedules' own are brought in line with them. Where they did several times the least times do,
and a last row tells what picking by one of these races costs by the others: how far this machine
agrees with itself.

"""
READ_GPU = """
Networks at batch 1, kernels in float32. The best time is the best on record.

"""
# The model of all records, and that of records of other machines.
LEARNED = "learned"
ELSEWHERE = "learned elsewhere"
# Kernels of a layer that a search measures at most.
TRIALS = 4


def table(judged: Sequence[Judged], place: Place, count: int) -> str:
    layers = sum(len(network.choices) for network in judged)
    large = [network.name for network in judged if network.place.network > SMALL]
    lines = [
        f"{place.machine}, {place.threads} threads; {count} records. {layers} layers with a choice "
        f"of algorithm in {len(judged)} networks; the trees that predict one saw none of its "
        "layers." + (f" Timed as in large networks: {', '.join(large)}." if large else ""),
        "",
        "| picks by | regret of the algorithm, median | 95th percentile | worst | of the schedule, "
        "median | 95th percentile |",
        "|---|---|---|---|---|---|",
    ]
    for model in judged[0].scores if judged else ():
        algorithm, schedule = [], []
        for network in judged:
            for index in network.choices:
                scores = network.scores[model][index]
                algorithm.append(network.layers[index].algorithm_regret(scores))
                schedule.append(network.layers[index].schedule_regret(scores))
        cells = [np.median(algorithm), np.percentile(algorithm, 95), max(algorithm)]
        cells += [np.median(schedule), np.percentile(schedule, 95)]
        if model in rules_of_thumb.NAMES:
            cells[3:] = []
        lines.append(_row(model, cells))
    layers_of = [n.layers[index] for n in judged for index in n.choices]
    if noise := [regret for layer in layers_of for regret in layer.race_regrets()]:
        cells = [np.median(noise), np.percentile(noise, 95), max(noise)]
        lines.append(_row("one race, by the others", cells))
    lines += ["", *budgets(judged)]
    lines += [
        "",
        "Time predicted over measured, of each network in the kernels that the model picks:",
        "",
        f"| network | layers | with a choice | learned | {ELSEWHERE} | analytic |",
        "|---|---|---|---|---|---|",
    ]
    for network in judged:
        errors = [
            f"{network.network_error(model):+.1%}" if model in network.scores else "-"
            for model in (LEARNED, ELSEWHERE, "analytic")
        ]
        choice = len(network.choices)
        lines.append(
            f"| {network.name} | {len(network.layers)} | {choice} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def _row(name: str, cells: Sequence[float]) -> str:
    """A line of five cells, of which the last may be missing."""
    shown = [f"{cell:.1%}" for cell in cells] + ["-"] * (5 - len(cells))
    return f"| {name} | {' | '.join(shown)} |"


def budgets(judged: Sequence[Judged]) -> list[str]:
    """What a network loses where only the best predicted kernels of each layer are measured."""
    lines = [
        "Where only the best predicted kernels of each layer are measured, and the fastest of them "
        "is taken: its time over that of the best on record, and in brackets the share of all "
        "candidates that was measured. *On record* says how many of them the survey measured.",
        "",
        "| network | candidates | on record | "
        + " | ".join(f"{count} a layer" for count in BUDGETS)
        + f" | a search with {TRIALS} trials | {ELSEWHERE} |",
        "|---|---|---|" + "---|" * (len(BUDGETS) + 2),
    ]
    for network in judged:
        if LEARNED not in network.scores:
            continue
        sizes = [len(layer.schedules) for layer in network.layers]
        best = sum(layer.microseconds.min() for layer in network.layers)
        cells = []
        for count in BUDGETS:
            taken = sum(
                layer.microseconds[np.argsort(scores)[:count]].min()
                for layer, scores in zip(network.layers, network.scores[LEARNED], strict=True)
            )
            share = sum(min(size, count) for size in sizes) / network.candidates
            cells.append(f"{taken / best - 1:.1%} ({share:.1%})")
        for model in (LEARNED, ELSEWHERE):
            count, loss = network.guided.get(model, (0, 0.0))
            cells.append(f"{loss:.1%} ({count / network.candidates:.1%})" if count else "-")
        known = f"{sum(sizes) / network.candidates:.0%}"
        lines.append(f"| {network.name} | {network.candidates} | {known} | {' | '.join(cells)} |")
    return lines


def plot(judged: Sequence[Judged]) -> str:
    """Predicted against measured microseconds of every kernel, a panel for each model."""
    size, left, top, parts = 380.0, 60.0, 30.0, list[str]()
    for panel, model in enumerate((LEARNED, "analytic")):
        points = [
            (us, score)
            for network in judged
            if model in network.scores
            for layer, scores in zip(network.layers, network.scores[model], strict=True)
            for us, score in zip(layer.microseconds, scores, strict=True)
        ]
        if points:
            x = left + panel * (size + 90)
            parts += svg.scatter(points, x, top, size, "measured us", f"{model}: predicted us")
    return svg.document(left + 2 * (size + 90), top + size + 60, parts)
