"""Plots of the metrics of a run."""

import textwrap
from pathlib import Path

from ddpm_pipe.run.folder import Run


def write_report(run: Run) -> Path:
    """Draw loss, loss by timestep, gradient norm, learning rate and speed into `<run>/report.png`.

    Below them are the sentences that the run told of itself, with the steps at which they began to hold.

    Raises:
        ValueError: where the run has no metrics.
    """
    from matplotlib.figure import Figure  # slow to import, and needed only once at the end

    entries = run.read_metrics()
    if not entries:
        raise ValueError(f"{run} has no metrics to draw a report from.")
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)

    def draw(axis, names: list[str], title: str, log: bool = False) -> None:
        for name in names:
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else "")
        axis.set(title=title, xlabel="optimizer step", yscale="log" if log else "linear")
        if axis.lines:
            axis.legend(fontsize="x-small")

    bins = sorted({name for entry in entries for name in entry if name.startswith("loss/t_")})
    held_out_bins = sorted({name for entry in entries for name in entry if name.startswith("held_out_loss/t_")})
    draw(axes[0, 0], ["loss", "held_out_loss"], "loss", log=True)
    draw(axes[0, 1], bins, "loss by timestep (share of T)", log=True)
    draw(axes[0, 2], held_out_bins, "held-out loss of the average by timestep", log=True)
    draw(axes[1, 0], ["gradient_norm"], "gradient norm", log=True)
    draw(axes[1, 1], ["learning_rate"], "learning rate")
    draw(axes[1, 2], ["images_per_second"], "images per second")
    told = [f"step {entry['step']}: {sentence}" for entry in entries for sentence in entry.get("diagnosis", ())]
    if told:
        figure.supxlabel("\n".join(textwrap.fill(line, 200) for line in told), x=0.01, ha="left", fontsize="small")
    figure.savefig(run.report, dpi=100)
    return run.report
