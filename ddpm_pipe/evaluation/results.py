"""Results of an evaluation: metrics with their protocols, as evaluation.json, as a table and as curves of a sweep."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_pipe.samplers import Sampler

NEARLY = 1.05
"""How many times the best FID of a sweep the recommended sampler may have."""


@dataclass(frozen=True)
class Metric:
    """One number, as evaluation.json holds it and the model card shows it.

    Attributes:
        type: what is measured, in one word.
        name: the name of the metric, which differs with the number of images and the feature network.
        value: the number.
        protocol: how it was measured, in one line.
        standard_error: standard error of the value; None where it is not given apart from the protocol.
        terms: the terms whose sum is the value.
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
    """Return the finite metrics, and print a sentence about each of the others."""
    for metric in metrics:
        if not math.isfinite(metric.value):
            print(f"{metric.name} ({metric.protocol}) is {metric.value}, not a finite number; it is left out.")
    return [metric for metric in metrics if math.isfinite(metric.value)]


@dataclass(frozen=True)
class Point:
    """What was measured of the images of one setting of a sweep, or of the config without a sweep.

    Attributes:
        model: the model that drew the images, as the config names it.
        settings: the options that the sweep changes in the config.
        sampling: the protocol of sampling.
        sampler: the sampler.
        network_calls: how often the network is evaluated for an image, twice in a step with guidance.
        seconds_per_image: seconds that one process takes for an image.
        metrics: metrics of the images.
    """

    model: Path
    settings: dict[str, Any]
    sampling: dict[str, Any]
    sampler: Sampler
    network_calls: int
    seconds_per_image: float
    metrics: list[Metric]

    @property
    def distance(self) -> float:
        """The FID; infinite where the point has none."""
        return next((metric.value for metric in self.metrics if metric.type.startswith("fid")), math.inf)

    def to_json(self) -> dict[str, Any]:
        content = {name: value for name, value in vars(self).items() if name not in ("model", "sampler")}
        return content | {"metrics": [metric.to_json() for metric in self.metrics]}


@dataclass(frozen=True)
class Results:
    """All results of one evaluation.

    Attributes:
        model: the model of the config.
        sampling: the protocol of sampling that model.
        facts: facts about the data and the feature network, as JSON values.
        points: one for each setting of the sweep, or one for the config; empty where no images were drawn.
        others: metrics of the config's model that belong to no point.
    """

    model: Path
    sampling: dict[str, Any]
    facts: dict[str, Any]
    points: list[Point]
    others: list[Metric]

    def finite(self) -> "Results":
        """Return the same results without the metrics that are not finite.

        Raises:
            ValueError: where no metric is left.
        """
        points = [dataclasses.replace(point, metrics=only_finite(point.metrics)) for point in self.points]
        others = only_finite(self.others)
        if not others and not any(point.metrics for point in points):
            raise ValueError("none of the metrics is finite; nothing is written. Are the weights of the model finite?")
        return dataclasses.replace(self, points=points, others=others)

    def of(self, model: Path) -> dict[str, Any]:
        """Return the evaluation.json of one model: all points, but under `metrics` only those of its own best point."""
        own_points = [point for point in self.points if point.model == model]
        metrics = list(min(own_points, key=lambda point: point.distance).metrics) if own_points else []
        is_own = model == self.model
        return self.facts | {
            "sampling": self.sampling if is_own else own_points[0].sampling,
            "points": [point.to_json() for point in self.points],
            "metrics": [metric.to_json() for metric in metrics + self.others * is_own],
        }

    def recommended(self, model: Path) -> Sampler | None:
        """Return the sampler of a model with the fewest network calls whose FID is within 5 % of the best of the sweep.

        Of several with as many calls it is that of the lowest FID. Images with a guide do not count: the pipeline does
        not carry that model.

        Returns:
            The sampler; None where fewer than two settings of the model have an FID.
        """
        own = [point for point in self.points if point.model == model and "guide" not in point.sampling]
        points = [point for point in own if point.distance < math.inf]
        if len(points) < 2:
            return None
        best = min(point.distance for point in points)
        nearly = [point for point in points if point.distance <= NEARLY * best]
        chosen = min(nearly, key=lambda point: (point.network_calls, point.distance))
        told = (
            f"{chosen.metrics[0].name} {chosen.distance:.4g} with {chosen.network_calls} network calls for an image; "
            f"the best of the sweep is {best:.4g}"
        )
        return chosen.sampler.replace(protocol=told)

    def table(self) -> str:
        """Return all metrics as a Markdown table."""
        lines = ["| metric | value | protocol |", "| --- | --- | --- |"]
        metrics = [metric for point in self.points for metric in point.metrics] + self.others
        return "\n".join(lines + [f"| {metric.name} | {metric.value:.4g} | {metric.protocol} |" for metric in metrics])

    def draw_sweep(self, file: Path) -> None:
        """Draw FID over steps and over seconds per image; a line joins the points that differ only in their steps.

        Points without FID are left out; if no point has one, nothing is drawn.
        """
        from matplotlib.figure import Figure  # slow to import, and needed only here

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
