"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

from post_training.metrics.records import read_records


def plot_loss(metrics: Path, picture: Path) -> None:
    """Draw training and evaluation loss over iterations, and the learning rate below them.

    Args:
        metrics: a run's `metrics.jsonl`.
        picture: the PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [record for _, record in read_records(metrics)]
    steps = [r for r in records if r.get("lm_loss") is not None]
    if not steps:
        return
    # Without pyplot: no global state and no display is looked for.
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    iterations = [r["iteration"] for r in steps]
    upper.plot(iterations, [r["lm_loss"] for r in steps], label="training", linewidth=1.2)
    for split in ("valid", "test"):
        points = [r for r in records if r.get("split") == split and r.get("loss") is not None]
        if points:
            upper.plot(
                [r["iteration"] for r in points],
                [r["loss"] for r in points],
                marker="o",
                linewidth=1.2,
                label={"valid": "validation", "test": "test"}[split],
            )
    upper.set_ylabel("loss per trained token")
    upper.legend()
    upper.grid(alpha=0.3)
    lower.plot(iterations, [r["lr"] for r in steps], color="tab:green", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("iteration")
    lower.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
