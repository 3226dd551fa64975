"""A plan as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tvm_lowrank.layer_plan import LayerPlan
from tvm_lowrank.metrics import BUILT_IN
from tvm_lowrank.plan import Plan


def render(plan: Plan) -> RenderableType:
    """One row a layer, the reasons of those left as they are, then the measured totals."""
    times = "predicted microseconds" if plan.result.get("predicted") else "microseconds"
    table = Table(
        title=f"layers: {times}, and megabytes of weights as the kernels keep them",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("shape", overflow="fold")
    table.add_column("form", no_wrap=True)
    table.add_column("algorithm", overflow="fold")
    for heading in ("rank", "error", "predicted", "before", "after", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in plan.layers:
        table.add_row(*_row(layer))
    before = sum(layer.dense_us or 0.0 for layer in plan.layers)
    after = sum(layer.measured_us or 0.0 for layer in plan.layers)
    table.add_section()
    table.add_row(
        "sum",
        "",
        f"{len(plan.rewritten)} rewritten",
        "",
        "",
        "",
        "",
        *_times(before, after),
        _megabytes(plan.result["kernel_weight_bytes"]),
    )
    parts: list[RenderableType] = [table]
    if plan.curve:
        parts.append(_curve(plan))
    return Group(*parts, Text(_reasons(plan) + summary(plan)))


def _curve(plan: Plan) -> Table:
    """Every choice that was tried: what its convolutions take and what it loses."""
    table = Table(
        title=f"choices tried, {plan.metric} on {plan.curve[0]['samples']} selection samples",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("us", "speed-up", "drop", "95 % interval", "agree", "forms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    for point in plan.curve:
        interval = point["interval"]
        words = ["kept" if point["keeps"] else "missed"]
        words += ["trained"] if point["recovered"] else []
        table.add_row(
            f"{point['microseconds']:.1f}",
            f"{point['dense_us'] / point['microseconds']:.2f}x",
            f"{point['drop']:.2f}",
            f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
            f"{point['agreement']:.2f} %",
            str(point["rewritten"]),
            ", ".join(words),
        )
    return table


def _reasons(plan: Plan) -> str:
    """The layers left dense, grouped by why, and those fitted without data."""
    groups: dict[str, list[str]] = {}
    for layer in plan.layers:
        if layer.reason:
            groups.setdefault(layer.reason, []).append(layer.name)
    lines = [f"dense: {', '.join(names)} ({why})\n" for why, names in groups.items()]
    blind = [layer.name for layer in plan.rewritten if layer.fitted == "weights"]
    if blind:
        lines.append(f"fitted to the weights alone, not to data: {', '.join(blind)}\n")
    return "".join(lines)


def summary(plan: Plan) -> str:
    """The measured figures in a few lines."""
    result = plan.result
    lines = []
    if not plan.transformed:
        lines.append(f"No form is changed: {plan.reason}.")
    how = f"medians of {result['runs']} runs in turns, batch {result['batch']}, "
    how += f"{plan.threads} threads"
    if not result["runs"]:
        source = "PREDICTED by a model and not measured" if result["predicted"] else "measured"
        how = f"convolutions and dense layers alone, {source}, batch {result['batch']}"
    lines.append(
        f"latency   {result['latency_before_ms']:.3f} ms -> {result['latency_after_ms']:.3f} ms "
        f"({result['speedup']:.2f}x; {how}; before: as it is, in tuned direct kernels)"
    )
    if result.get("parallel_efficiency") is not None and plan.threads > 1:
        lines.append(
            f"threads   {result['latency_one_thread_ms']:.3f} ms on one: {plan.threads} are "
            f"{plan.threads * result['parallel_efficiency']:.2f}x as fast "
            f"(efficiency {100 * result['parallel_efficiency']:.0f} %)"
        )
    if result["accuracy_before"] is not None:
        lines.append(_accuracy(plan))
    data = "of noise: accuracy was NOT measured" if result["synthetic_data"] else ""
    lines.append(
        f"agreement {result['agreement']:.2f} %, relative output error "
        f"{result['output_error']:.4f} on {result['samples']} samples {data}".rstrip()
    )
    lines.append(
        f"weights   {result['weight_bytes_before'] / 1e6:.2f} MB -> "
        f"{result['weight_bytes_after'] / 1e6:.2f} MB (convolutions and fully connected layers, "
        f"float32); "
        f"{result['kernel_weight_bytes'] / 1e6:.2f} MB as the kernels keep them"
    )
    if left := result.get("left_to_tvm"):
        names = ", ".join(f"{count} {name}" for name, count in left.items())
        lines.append(f"no kernels for {names}: TVM's own loops, with its maps unblocked")
    return "\n".join(lines)


def _accuracy(plan: Plan) -> str:
    result = plan.result
    if plan.metric == "psnr":
        return f"PSNR      {result['accuracy_after']:.1f} dB against the original's output"
    percent = " %" if plan.metric in BUILT_IN else ""
    name = {"pitch": "pitch"}.get(plan.metric, "top-1" if percent else "score")
    return (
        f"{name:9} {result['accuracy_before']:.2f}{percent} -> {result['accuracy_after']:.2f}"
        f"{percent} (drop {result['drop']:.2f} points{_interval(result)})"
    )


def _interval(result: dict[str, Any]) -> str:
    """The drop's confidence interval, if the plan has one."""
    found = result.get("drop_interval")
    return f", 95 % interval {found[0]:.2f} to {found[1]:.2f}" if found else ""


def _row(layer: LayerPlan) -> list[str]:
    lossy = layer.form != "dense"
    return [
        layer.name,
        str(layer.geometry or ""),
        layer.form,
        ", ".join(layer.algorithms),
        str(layer.rank).strip("()") if lossy else "",
        f"{layer.error:.4f}" if lossy else "",
        *_times(layer.predicted_us, layer.dense_us, layer.measured_us),
        _megabytes(layer.weight_bytes),
    ]


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def _times(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.1f}" for value in values]
