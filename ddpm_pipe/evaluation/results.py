"""What an evaluation found: metrics with their protocols, as evaluation.json, as a table and as curves of a sweep."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number, as evaluation.json holds it and the model card shows it.

    Attributes:
        type: what is measured, in one word.
        name: what it is called; other numbers of images, or of another feature network, have another name.
        value: the number.
        protocol: how it was measured, in a line.
        standard_error: of the value, where it is told apart from the protocol.
        terms: what the value is the sum of.
    """

    type: str
    name: str
    value: float
    protocol: str
    standard_error: float | None = None
    terms: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


def only_finite(metrics: list[Metric]) -> list[Metric]:
    """Those that are finite; a sentence names each of the others, which would say nothing."""
    for metric in metrics:
        if not math.isfinite(metric.value):
            print(f"{metric.name} ({metric.protocol}) is {metric.value}, not a finite number; it is left out.")
    return [metric for metric in metrics if math.isfinite(metric.value)]


@dataclass(frozen=True)
class Point:
    """What the images of one setting of a sweep, or of the config alone, were found to be.

    Attributes:
        model: whose images they are, as the config has it.
        settings: what the sweep changes of the config.
        sampling: the protocol.
        seconds_per_image: of one process.
        metrics: of the images.
    """

    model: Path
    settings: dict[str, Any]
    sampling: dict[str, Any]
    seconds_per_image: float
    metrics: list[Metric]

    @property
    def distance(self) -> float:
        """The FID; infinite where it has none."""
        return next((metric.value for metric in self.metrics if metric.type.startswith("fid")), math.inf)

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if name != "model"}
        return content | {"metrics": [metric.to_json() for metric in self.metrics]}


@dataclass(frozen=True)
class Results:
    """All that one evaluation found.

    Attributes:
        model: of the config.
        sampling: its protocol.
        facts: about the data and the feature network, as JSON has them.
        points: the settings of the sweep, or the one of the config; none where no images were drawn.
        others: metrics of the model of the config that are not of a point.
    """

    model: Path
    sampling: dict[str, Any]
    facts: dict[str, Any]
    points: list[Point]
    others: list[Metric]

    def finite(self) -> "Results":
        """The same without metrics that are not finite.

        Raises:
            ValueError: where none is left.
        """
        points = [dataclasses.replace(point, metrics=only_finite(point.metrics)) for point in self.points]
        others = only_finite(self.others)
        if not others and not any(point.metrics for point in points):
            raise ValueError("none of the metrics is finite; nothing is written. Are the weights of the model finite?")
        return dataclasses.replace(self, points=points, others=others)

    def of(self, model: Path) -> dict[str, Any]:
        """The evaluation.json of one model: all points, but as `metrics` only its own, those of its best point."""
        own_points = [point for point in self.points if point.model == model]
        metrics = list(min(own_points, key=lambda point: point.distance).metrics) if own_points else []
        is_own = model == self.model
        return self.facts | {
            "sampling": self.sampling if is_own else own_points[0].sampling,
            "points": [point.to_json() for point in self.points],
            "metrics": [metric.to_json() for metric in metrics + self.others * is_own],
        }

    def table(self) -> str:
        """All metrics as a Markdown table."""
        lines = ["| metric | value | protocol |", "| --- | --- | --- |"]
        metrics = [metric for point in self.points for metric in point.metrics] + self.others
        return "\n".join(lines + [f"| {metric.name} | {metric.value:.4g} | {metric.protocol} |" for metric in metrics])

    def draw_sweep(self, file: Path) -> None:
        """Draw FID over the number of steps and over the seconds of an image; one line for each of the other settings.

        Points without FID are left out; where none has one, nothing is drawn.
        """
        from matplotlib.figure import Figure  # heavy, and needed once at the end

        points = [point for point in self.points if point.distance < math.inf]
        if not points:
            return
        figure = Figure(figsize=(12, 5), layout="constrained")
        by_steps, by_time = figure.subplots(1, 2)
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for point in points:
            rest = ", ".join(f"{name}={value}" for name, value in point.settings.items() if name != "steps")
            lines.setdefault(rest, []).append((point.sampling["steps"], point.seconds_per_image, point.distance))
        for rest, values in lines.items():
            steps, seconds, distances = zip(*sorted(values), strict=True)
            by_steps.plot(steps, distances, marker="o", label=rest)
            by_time.plot(seconds, distances, marker="o", label=rest)
        for axis, label in ((by_steps, "steps"), (by_time, "seconds per image and process")):
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=points[0].metrics[0].name)
            if any(lines):
                axis.legend(fontsize="x-small")
        figure.savefig(file, dpi=100)
