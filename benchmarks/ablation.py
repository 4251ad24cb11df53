"""What each choice of a recipe is worth for equal compute: `python benchmarks/ablation.py --judges a.pt b.pt`.

An arm is a preset with some keys replaced, and the first arm of the file is the one that others are compared with. The
milliseconds of a step of all arms are measured in turn, as processor time of one thread, and every arm then trains for
as many steps as take as long as `--steps` of the first. So what else the machine does does not matter. With `--equal
images` every arm sees as many images as the first instead.

Each trained model draws images, as many of each class, without guidance. Every judge (see judges.py) then compares
them with the training images, and the loss is measured on the test images. Each result is a line of a file, and a
script that was killed goes on after the last of them.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState
from recipes import our_step
from scipy import stats
from timing import DEVICE, table

from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import parse
from ddpm_pipe.data.memory import ImageData, load_images
from ddpm_pipe.evaluation.features import FeatureNetwork, extract, load_features
from ddpm_pipe.evaluation.metrics import frechet_distance, precision_recall
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.sampling.config import SampleConfig
from ddpm_pipe.sampling.protocol import pipeline_for, sample_images
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.log import named_means
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.recipe import make_objective, make_scheduler
from ddpm_pipe.training.validation import held_out_sums

ARMS = Path(__file__).with_suffix(".yaml")
BUNDLED = str(Path(__file__).resolve().parent.parent / "examples" / "fashion_mnist")
SAMPLER = {"scheduler": "dpm++", "steps": 10, "class_labels": "balanced", "batch_size": 100}
MANIFOLD = 2000
"""Number of real images, evenly spread, to which precision and recall refer."""

COMMON = {"sample_every": 0, "tracker": "none", "mixed_precision": "no"}
LOSSES = {"loss": "held_out_loss"} | {
    f"at t {share} %": f"held_out_loss/t_{share}%" for share in ("00", "30", "60", "90")
}
"""Column of the table -> name of the loss in the package's validation."""


def make_arm(changes: dict[str, Any], preset: Path, data: str) -> TrainConfig:
    """The config of an arm."""
    return parse(TrainConfig, [str(preset)], data=data).replace(**COMMON | changes)


def seconds_per_step(arms: dict[str, TrainConfig], rounds: int = 9, warm_up: int = 2) -> dict[str, float]:
    """Median processor time of a training step of each arm; their steps are taken in turn."""
    steps = {name: our_step(config, config.mixed_precision) for name, config in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if i >= warm_up:
                seconds[name].append(time.process_time() - start)
    AcceleratorState._reset_state(reset_partial_state=True)  # the runs make their own
    return {name: statistics.median(times) for name, times in seconds.items()}


def stretched(config: TrainConfig, steps: int) -> TrainConfig:
    """The config for another number of steps; the warm-up is stretched with it."""
    warm_up = round(config.lr_warmup_steps * steps / config.steps)
    return config.replace(steps=steps, lr_warmup_steps=warm_up, save_every=steps)


# ---------------------------------------------------------------- judging


class Bench:
    """Real images and the judges that compare generated ones with them."""

    def __init__(self, data: str, judges: list[str], images: int):
        self.images = images
        self.real, self.test = load_images(data), load_images(data, "test", with_labels=True)
        self.judges: dict[str, FeatureNetwork] = {Path(file).stem: load_features(file, DEVICE) for file in judges}
        self.features = {name: self._features(judge, self.real) for name, judge in self.judges.items()}

    @staticmethod
    def _features(judge: FeatureNetwork, data: ImageData) -> torch.Tensor:
        return extract(judge, lambda places: data.take(torch.tensor(places))[0], len(data))[0]

    def draw(self, pipeline: DDPMPipeline, sampling: SampleConfig) -> ImageData:
        """Draw the images that are compared."""
        seeds = list(range(self.images))
        batches = sample_images(pipeline.to(DEVICE), seeds, sampling.batch_size, **sampling.call_options())
        return ImageData(torch.cat([images for _, images, _ in batches]), torch.arange(self.images))

    def compare(self, drawn: ImageData) -> dict[str, float]:
        """Distance, precision and recall of images by each judge."""
        found = {}
        for name, judge in self.judges.items():
            features, real = self._features(judge, drawn), self.features[name]
            some = real[:: len(real) // MANIFOLD]
            manifolds = dict(zip(("precision", "recall"), precision_recall(features, some), strict=True))
            measured = {"FD": frechet_distance(features, real)} | manifolds
            found |= {f"{kind} {name}": value for kind, value in measured.items()}
        return found

    def held_out(self, config: TrainConfig, unet: torch.nn.Module) -> dict[str, float]:
        """Losses of a trained network on the test images."""
        plain = config.replace(loss="l2", loss_weight="none", seed=0)
        objective = make_objective(plain, make_scheduler(plain))
        return named_means("held_out_loss", held_out_sums(plain, unet, objective, self.test, DEVICE))


# ---------------------------------------------------------------- the table


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def interval(values: list[float]) -> str:
    """Mean and, of several values, half of the 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3g} ± {half:.2g}"


def show(results: list[dict[str, Any]], names: list[str], budget: str) -> None:
    """Print one row for each arm that has results of this budget."""
    results = [result for result in results if result["budget"] == budget]
    judged = [name for name in dict.fromkeys(key for result in results for key in result) if " " in name]
    columns = dict(zip(judged, judged)) | LOSSES
    rows = []
    for name in names:
        mine = [result for result in results if result["arm"] == name]
        if mine:
            steps = str(round(statistics.mean(result["steps"] for result in mine)))
            told = [interval([result[key] for result in mine]) for key in columns.values()]
            rows.append([name, str(len(mine)), f"{statistics.mean(r['ms'] for r in mine):.0f}", steps, *told])
    table(f"{budget} of the first arm", ["arm", "seeds", "ms", "steps", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=ARMS, help="YAML file: arm -> keys of the preset that it replaces")
    parser.add_argument("--only", nargs="+", help="train only these arms")
    parser.add_argument("--judges", nargs="+", required=True, help="files of feature networks")
    parser.add_argument("--preset", type=Path, default=PRESETS["fashion_mnist"])
    parser.add_argument("--data", default=BUNDLED)
    parser.add_argument("--steps", type=int, default=1000, help="compute of every arm, in steps of the first")
    parser.add_argument("--equal", choices=("compute", "images"), default="compute", help="what all arms have alike")
    parser.add_argument("--images", type=int, default=1000, help="images that each trained model draws")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=Path("ablation.jsonl"))
    parser.add_argument("--keep", type=Path, help="where to keep the runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = yaml.safe_load(options.arms.read_text())
    first = next(iter(changes))
    budget = f"{options.steps} steps" if options.equal == "compute" else f"the images of {options.steps} steps"
    done = {(line["arm"], line["seed"]) for line in read_lines(options.results) if line["budget"] == budget}
    wanted = [(arm, seed) for seed in options.seeds for arm in options.only or changes if (arm, seed) not in done]
    arms = {name: make_arm(changes[name], options.preset, options.data) for name in [first, *dict(wanted)]}
    seconds = seconds_per_step(arms) if wanted else {}
    bench = Bench(options.data, options.judges, options.images)
    cost = seconds if options.equal == "compute" else {name: arms[name].batch_size for name in arms}
    for arm, seed in wanted:
        steps = round(options.steps * cost[first] / cost[arm])
        with tempfile.TemporaryDirectory() as scratch:
            folder = (options.keep or Path(scratch)) / f"{arm}-{options.steps}-{seed}"
            config = stretched(arms[arm], steps).replace(seed=seed, output_dir=str(folder), overwrite=True)
            start = time.process_time()
            trained = train(config)
            used = {"steps": steps, "ms": 1000 * seconds[arm], "seconds": time.process_time() - start}
            sampling = SampleConfig(model=str(trained), **SAMPLER)
            pipeline = pipeline_for(sampling)
            judged = bench.compare(bench.draw(pipeline, sampling)) | bench.held_out(config, pipeline.unet)
        line = {"arm": arm, "seed": seed, "budget": budget, "images": options.images} | used | judged
        append(options.results, line)
    show(read_lines(options.results), list(changes), budget)


if __name__ == "__main__":
    main()
