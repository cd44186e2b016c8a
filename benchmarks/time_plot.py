"""Time against length as a picture."""

from pathlib import Path

from benchmarks.tables import Row, timed


def draw(rows: list[Row], path: Path) -> None:
    """Time against length, both logarithmic: dense kernels and settings of rr_attention with two lengths or more.

    Cards without any are left out. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    pictures = []
    for card in dict.fromkeys(row["card"] for row in rows):
        of_card = [row for row in rows if row["card"] == card]
        shape = max(
            {like(row) for row in of_card}, key=lambda shape: len({r["length"] for r in of_card if like(r) == shape})
        )
        lines = lines_of([row for row in of_card if like(row) == shape])
        lines = {label: points for label, points in sorted(lines.items()) if len(points) > 1}
        if lines:
            pictures.append((card, shape, lines))
    figure = Figure(figsize=(8, 5.5 * max(len(pictures), 1)), layout="constrained")
    axes = figure.subplots(max(len(pictures), 1), squeeze=False)[:, 0]
    for axis, (card, shape, lines) in zip(axes, pictures, strict=bool(pictures)):
        for label, points in lines.items():
            dense = label.startswith("dense")
            lengths, times = zip(*sorted(points.items()), strict=True)
            axis.plot(lengths, times, "--" if dense else "-", marker="o", markersize=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        heads, kv_heads, head_dim, dtype, _ = shape
        axis.set_title(f"{card}: causal prefill, {heads}/{kv_heads} heads of {head_dim}, {dtype}", fontsize=11)
        axis.set_xlabel("length (tokens)")
        axis.set_ylabel("time of one layer's attention (ms)")
        ticks = sorted({length for line in axis.lines for length in line.get_xdata()})
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=130)


def like(row: Row) -> tuple:
    """What rows on one line share."""
    return row["heads"], row["kv_heads"], row["head_dim"], row["dtype"], row["workload"]


def lines_of(rows: list[Row]) -> dict[str, dict[int, float]]:
    """Milliseconds by label and length, timed alone where there is such a row, else in turns."""
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=timed, reverse=True):
        for name, result in row["dense"].items():
            if "ms" in result:
                lines.setdefault(f"dense, {name}", {})[row["length"]] = result["ms"]
        if row["total_ms"] is not None and row["wanted_error"] is None and timed(row) != "rested":
            wanted = row["wanted_density"]
            label = (
                "rr_attention, dense below min_length" if wanted is None else f"{row['label']}, density {wanted:.2f}"
            )
            lines.setdefault(label, {})[row["length"]] = row["total_ms"]
    return lines
