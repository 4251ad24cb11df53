"""Few steps over several seeds of training: `python benchmarks/students.py --judges features.pt --seeds 0 1 2`.

For each seed it trains a teacher with a preset, tunes a student for as many images (objective consistency), and
searches timesteps for the teacher. Each judge (see judges.py) then compares the images of both, in few steps and in
many. A line of a file holds a result, and a script that was killed goes on after the last of them.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from ablation import BUNDLED, COMMON, Bench, append, interval, read_lines
from timing import table

from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import parse
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sampling.config import SampleConfig, TimestepsConfig
from ddpm_pipe.sampling.protocol import pipeline_for
from ddpm_pipe.sampling.timesteps import learn_timesteps
from ddpm_pipe.training.config import TrainConfig
from ddpm_pipe.training.loop import train

TEACHER = [(2, False), (4, False), (4, True), (8, False), (10, False), (20, False)]
"""Steps of DPM-Solver++, and whether their timesteps are searched."""
STUDENT = [1, 2, 4]
STUDENT_KEYS: dict[str, Any] = {"objective": "consistency", "learning_rate": 1e-3, "lr_warmup_steps": 20}


def train_once(config: TrainConfig) -> str:
    """Train, unless that was done before, and return the folder of the pipeline."""
    pipeline = Run(config.output_dir).pipeline
    return str(pipeline if pipeline.exists() else train(config.replace(overwrite=True)))


def samplers(teacher: str, student: str, guidance: float) -> dict[str, SampleConfig]:
    """The rows of the table -> how their images are drawn; a TimestepsConfig is searched first."""
    common: dict[str, Any] = {"batch_size": 100, "class_labels": "balanced"}
    rows: dict[str, SampleConfig] = {}
    for steps, searched in TEACHER:
        name = f"teacher, {'searched' if searched else 'DPM-Solver++'}, {steps}"
        kind = TimestepsConfig if searched else SampleConfig
        rows[name] = kind(model=teacher, scheduler="dpm++", steps=steps, guidance_scale=guidance, **common)
    return rows | {f"student, {steps}": SampleConfig(model=student, steps=steps, **common) for steps in STUDENT}


def measure(bench: Bench, sampling: SampleConfig) -> dict[str, Any]:
    """Draw the images of a row, and compare them."""
    if isinstance(sampling, TimestepsConfig):
        learn_timesteps(sampling)
    pipeline = pipeline_for(sampling)
    if not isinstance(sampling, TimestepsConfig):
        pipeline.samplers = None  # even timesteps, also where others were searched before
    start = time.process_time()
    drawn = bench.draw(pipeline, sampling)
    return {"ms": 1000 * (time.process_time() - start) / len(drawn)} | bench.compare(drawn)


def show(results: list[dict[str, Any]]) -> None:
    """Print one row for each sampler, with 95 % intervals over the seeds."""
    judged = [name for name in results[0] if " " in name]
    rows = []
    for name in dict.fromkeys(result["sampler"] for result in results):
        mine = [result for result in results if result["sampler"] == name]
        told = [interval([result[key] for result in mine]) for key in ("ms", *judged)]
        rows.append([name, str(len(mine)), *told])
    table("Few steps", ["sampler, steps", "seeds", "ms per image", *judged], rows)


def lines_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of this guidance."""
    return [line for line in read_lines(options.results) if line["guidance"] == options.guidance]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judges", nargs="+", required=True, help="files of feature networks")
    parser.add_argument("--preset", type=Path, default=PRESETS["fashion_mnist"])
    parser.add_argument("--data", default=BUNDLED)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance", type=float, default=1.0, help="of the teacher, which the student learns")
    parser.add_argument("--images", type=int, default=1000, help="images that are compared")
    parser.add_argument("--runs", type=Path, default=Path("students"), help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=Path("students.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.data, options.judges, options.images)
    base = parse(TrainConfig, [str(options.preset)], data=options.data).replace(**COMMON)
    for seed in options.seeds:
        config = base.replace(seed=seed, output_dir=str(options.runs / f"teacher-{seed}"))
        teacher = train_once(config)
        keys = STUDENT_KEYS | {"init_from": teacher, "consistency_guidance": options.guidance}
        student = train_once(
            config.replace(output_dir=str(options.runs / f"student-{seed}-{options.guidance:g}"), **keys)
        )
        done = {line["sampler"] for line in lines_of(options) if line["seed"] == seed}
        for name, sampling in samplers(teacher, student, options.guidance).items():
            if name not in done:
                append(
                    options.results,
                    {"sampler": name, "seed": seed, "guidance": options.guidance} | measure(bench, sampling),
                )
    show(lines_of(options))


if __name__ == "__main__":
    main()
