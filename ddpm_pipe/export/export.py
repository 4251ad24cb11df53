"""The command that writes a model as a folder of static files: its network as ONNX, and a page that draws with it."""

import json
import shutil
import tempfile
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpm_pipe.export import runtime
from ddpm_pipe.export.config import ExportConfig
from ddpm_pipe.export.network import Denoiser, example_inputs, measure_parity, write_float16, write_float32
from ddpm_pipe.export.offers import offers
from ddpm_pipe.export.steps import Step
from ddpm_pipe.pipeline import null_class
from ddpm_pipe.pretrained import DDPMPipeline
from ddpm_pipe.run.files import replace_folder
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sampling.config import SampleConfig
from ddpm_pipe.sampling.protocol import pipeline_for
from ddpm_pipe.sharing.card import read_class_names
from ddpm_pipe.sharing.privacy import shared_name
from ddpm_pipe.weights import weights_sha256

DESCRIPTION = "export.json"
"""The file that tells the page what the model is; an output folder with it is an earlier export."""

TOLERANCES = {"float32": 1e-4, "float16": 5e-2}
"""Largest relative error of a network's answers. What is above it is not written."""

BATCHES = (1, 2, 5)
"""Numbers of images with which a network is compared with torch."""

CHECKED = 256
"""Most numbers of torch's answer that a page compares with that of the browser before it draws."""


def export(config: ExportConfig) -> Path:
    """Write a model as a folder for browsers and print what is in it.

    Returns:
        The folder.

    Raises:
        ValueError: for a model or a runtime that cannot be had, a model that a page cannot draw with, an ONNX file
            whose answers are not those of torch, or an output folder of something else.
    """
    out = Path(config.output_dir)
    if out.exists() and not (out.is_dir() and ((out / DESCRIPTION).exists() or not any(out.iterdir()))):
        raise ValueError(f"output_dir={config.output_dir!r} is neither empty nor an earlier export; name a new folder.")
    pipeline = pipeline_for(SampleConfig(model=config.model, revision=config.revision))
    facts = describe(config, pipeline)
    package = runtime.fetch(None if config.runtime is None else Path(config.runtime))
    with tempfile.TemporaryDirectory() as staged:
        folder = Path(staged) / "export"
        folder.mkdir()
        facts["networks"] = write_networks(pipeline, folder)
        facts["check"] = answer_of_torch(pipeline)
        (folder / DESCRIPTION).write_text(json.dumps(facts, separators=(",", ":")) + "\n")
        (folder / "index.html").write_bytes((files("ddpm_pipe.export") / "page.html").read_bytes())
        (folder / "README.md").write_text(readme(facts))
        runtime.unpack(package, folder / runtime.FOLDER)
        replace_folder(out, partial(shutil.copytree, folder, dirs_exist_ok=True))
    print(f"{out}: serve it with `python -m http.server --directory {out}`, or push it as a static Space.")
    return out


def describe(config: ExportConfig, pipeline: DDPMPipeline) -> dict[str, Any]:
    """Return what the page has to know of a model, but for its files.

    Raises:
        ValueError: for images that a page cannot show, or names of other classes.
    """
    shape, classes = pipeline.image_shape, null_class(pipeline.unet)
    if shape[0] not in (1, 3, 4):
        raise ValueError(f"a page shows images of 1, 3 or 4 channels, and those of this model have {shape[0]}.")
    run = Run(Path(config.model).resolve().parent)
    names = config.class_names or read_class_names(config.model, config.revision)
    if names and len(names) != classes:
        raise ValueError(f"class_names has {len(names)} entries for a model with {classes or 0} classes.")
    name = shared_name(str(run) if run.plan.exists() else config.model)
    return {
        "title": config.title or name,
        "model": name,
        "unet_sha256": weights_sha256(Path(pipeline.name_or_path)),
        "versions": {name: version(name) for name in ("ddpm_pipe", "torch", "diffusers", "onnxruntime")}
        | {"onnxruntime-web": runtime.VERSION},
        "shape": shape,
        "classes": classes,
        "class_names": names,
        "inputs": list(example_inputs(pipeline.unet, shape, 1, 1)),
        "step": Step._fields,
        "samplers": offers(pipeline),
    }


@torch.no_grad()
def write_networks(pipeline: DDPMPipeline, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the network in float32 and float16, and compare both with torch.

    Returns:
        Precision -> file, bytes and parity. float16 is left out, which a printed sentence says, where its answers are
        too far from those of torch.

    Raises:
        ValueError: where those of float32 are.
    """
    denoiser, steps = Denoiser(pipeline.unet).eval(), pipeline.scheduler.config.num_train_timesteps
    batches = [example_inputs(pipeline.unet, pipeline.image_shape, steps, size) for size in BATCHES]
    answers = [(inputs, denoiser(**inputs)) for inputs in batches]
    paths = {precision: folder / f"{precision}.onnx" for precision in TOLERANCES}
    write_float32(denoiser, paths["float32"], batches[-1])
    write_float16(paths["float32"], paths["float16"])
    networks = {}
    for precision, file in paths.items():
        parity = measure_parity(file, answers)
        told = f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {told_parity(parity)}"
        if not parity["relative_error"] <= TOLERANCES[precision]:
            if precision == "float32":
                raise ValueError(f"{told}, which is more than {TOLERANCES[precision]:g}; nothing is written.")
            file.unlink()
            print(f"{told}, which is more than {TOLERANCES[precision]:g}, so it is left out.")
            continue
        print(told)
        networks[precision] = {"file": file.name, "bytes": file.stat().st_size, "parity": parity}
    return networks


@torch.no_grad()
def answer_of_torch(pipeline: DDPMPipeline) -> dict[str, Any]:
    """Return what torch answers to the image sin(0), sin(1), ... of class 0, for a page to compare with.

    Returns:
        The `timestep`, every so many-th (`every`) number of the `answer`, and the relative error that is tolerated.
    """
    denoiser, steps = Denoiser(pipeline.unet).eval(), pipeline.scheduler.config.num_train_timesteps
    inputs = example_inputs(pipeline.unet, pipeline.image_shape, steps, 1)
    constant = {"timestep": float(steps // 2), "class_labels": 0, "self_cond": 0.0}
    inputs = {name: torch.full_like(value, constant.get(name, 0)) for name, value in inputs.items()}
    count = inputs["sample"].numel()
    inputs["sample"] = torch.arange(count).double().sin().float().view_as(inputs["sample"])
    answer, every = denoiser(**inputs).flatten(), -(-count // CHECKED)
    return {
        "timestep": steps // 2,
        "every": every,
        "answer": answer[::every].tolist(),
        "tolerance": TOLERANCES["float16"],
    }


def told_parity(parity: dict[str, Any]) -> str:
    """Say how far the answers of an ONNX file are from those of torch."""
    return (
        f"relative error {parity['relative_error']:.1e} and largest error {parity['max_abs_error']:.1e} against torch "
        f"on {parity['images']} images"
    )


def readme(facts: dict[str, Any]) -> str:
    """Return the README of a folder, whose head makes it a static Space of the Hub.

    The headers in it let a browser compute with several threads.
    """
    head = {
        "title": facts["title"],
        "sdk": "static",
        "app_file": "index.html",
        "pinned": False,
        "custom_headers": {
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        },
    }
    if "/" in facts["model"]:
        head["models"] = [facts["model"]]
    rows = [
        f"| `{row['file']}` | {row['bytes'] / 1e6:.1f} MB | {row['parity']['relative_error']:.1e} | "
        f"{row['parity']['max_abs_error']:.1e} | {row['parity']['images']} |"
        for row in facts["networks"].values()
    ]
    height, width = facts["shape"][1:]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {facts['title']}\n",
        f"`index.html` draws images of {height}x{width} pixels with the diffusion model `{facts['model']}` in a "
        "browser. Any server of static files can serve this folder: `python -m http.server`.\n",
        "The network is written as ONNX. Its answers in onnxruntime were compared with those of torch. The relative "
        "error is the root mean square of the error, divided by that of the answers.\n",
        "| file | size | relative error | largest error | images |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        f"\n`{runtime.FOLDER}/` holds parts of the npm package onnxruntime-web {runtime.VERSION}, under the MIT "
        f"licence: [licence]({runtime.FOLDER}/LICENSE), [notices]({runtime.FOLDER}/ThirdPartyNotices.txt).\n",
        f"`ddpm-pipe export` wrote this folder ({versions}).",
    ]
    return "\n".join(lines) + "\n"
