"""Samplers that a pipeline carries: timesteps that were searched, and the sampler that an evaluation recommends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import one_sentence
from hub_server import HubServer
from runs import move_to_root
from test_generate import make_model
from test_pipeline import ALPHA_BAR, MEAN, STD, final_sample, gaussian_pipe, stock_unet

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.evaluation.results import Metric, Point, Results
from ddpm_pipe.samplers import Sampler, Samplers, read_samplers
from ddpm_pipe.sampling.config import GenerateConfig, TimestepsConfig
from ddpm_pipe.sampling.protocol import pipeline_for, protocol, sample_images
from ddpm_pipe.sampling.timesteps import coordinate_search, learn_timesteps
from ddpm_pipe.sharing.card import make_card
from ddpm_pipe.weights import weights_sha256

DPM = "DPMSolverMultistepScheduler"
TRAILING = {"timestep_spacing": "trailing"}
LEARNED = [19, 9, 4, 1]

# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("target", [[950, 700, 420, 130], [999, 998, 997, 0], [300, 200, 100, 50]], ids=str)
def test_the_search_finds_the_lowest_of_a_convex_error(target):
    def error(timesteps: list[int]) -> float:
        assert all(1000 > a > b >= 0 for a, b in zip([*timesteps[:-1], timesteps[-1] + 1], [*timesteps[1:], 0]))
        return sum((t - aim) ** 2 for t, aim in zip(timesteps, target, strict=True))

    found = coordinate_search(error, [999, 749, 499, 249], 1000)
    assert all(abs(t - aim) <= 5 for t, aim in zip(found, target, strict=True))


def test_the_search_tries_nothing_twice_and_never_ends_above_its_start():
    tried = []

    def error(timesteps: list[int]) -> float:
        assert timesteps not in tried
        tried.append(timesteps)
        return hash(tuple(timesteps)) % 1000  # the hash of whole numbers is always the same

    found = coordinate_search(error, [18, 9, 0], 20)
    assert hash(tuple(found)) % 1000 == min(hash(tuple(each)) % 1000 for each in tried)
    assert coordinate_search(lambda timesteps: 0.0, [1, 0], 2) == [1, 0]


@pytest.mark.parametrize(
    "scheduler", [DPM, "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIM"]
)
def test_searched_timesteps_come_closer_to_the_exact_solution(scheduler):
    """For x0 ~ N(MEAN, STD^2), x_t - sqrt(alpha_bar) MEAN stays the same multiple of its standard deviation."""
    pipe = gaussian_pipe(scheduler, timestep_spacing="trailing")
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    level = ALPHA_BAR[-1].item()
    exact = MEAN + STD * (noise - level**0.5 * MEAN) / (level * STD**2 + 1 - level) ** 0.5

    def error(timesteps: list[int]) -> float:
        x0 = final_sample(pipe, batch_size=4, sample=noise, steps=None, timesteps=timesteps)
        return (x0 - exact).square().mean().sqrt().item()

    even = [999, 799, 599, 399, 199]
    assert error(coordinate_search(error, even, 1000)) < 0.7 * error(even)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A pipeline folder of a network with three classes and a chain of 20 timesteps."""
    return make_model(tmp_path_factory.mktemp("model") / "pipeline", num_class_embeds=3)


@pytest.fixture
def own(model, tmp_path) -> Path:
    """A copy of the pipeline folder for one test."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def searched(folder: Path, **options) -> Sampler | None:
    defaults = {"steps": 3, "scheduler": "ddim", "class_labels": "balanced", "num_images": 8}
    return learn_timesteps(TimestepsConfig(model=str(folder), **defaults | options))


def test_what_is_found_is_better_on_other_noise_kept_and_the_same_again(own, capsys):
    sampler = searched(own)
    told = capsys.readouterr().out
    assert sampler and f"timesteps {sampler.timesteps}: RMSE" in told and "kept in" in told
    first = (own / "samplers.json").read_bytes()
    assert read_samplers(own).learned == [sampler] and len(sampler.timesteps) == 3
    assert searched(own) == sampler and (own / "samplers.json").read_bytes() == first
    other = searched(own, steps=2)
    assert read_samplers(own).learned == [sampler, other]

    def images(**steps) -> torch.Tensor:
        options = {"batch_size": 16, "class_labels": "balanced"} | steps
        return torch.cat([drawn for _, drawn, _ in sample_images(pipeline, list(range(16)), **options)]).float()

    pipeline = DDPMPipeline.from_pretrained(own)
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **TRAILING)
    solution = images(num_inference_steps=20)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.own_scheduler.config, **TRAILING)
    learned = images(num_inference_steps=3)
    assert torch.equal(learned, images(timesteps=sampler.timesteps))
    pipeline.samplers = None
    even = images(num_inference_steps=3)
    assert (learned - solution).square().mean() < (even - solution).square().mean()


def test_where_nothing_better_is_found_the_default_is_kept(own, capsys):
    assert searched(own, steps=20, num_images=1) is None
    assert "nothing is kept" in capsys.readouterr().out and not (own / "samplers.json").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": None}, "steps=None must be a valid integer"),
        ({"scheduler": None}, "scheduler=DDPMScheduler with eta=0 draws noise in its steps"),
        ({"eta": 0.5}, "scheduler=DDIMScheduler with eta=0.5 draws noise in its steps"),
        ({"scheduler": "dpm++sde"}, "scheduler=DPMSolverMultistepScheduler with eta=0 draws noise"),
        ({"scheduler": "unipc"}, "timesteps cannot be given to UniPCMultistepScheduler"),
        ({"model": "org/name"}, "model='org/name' is not a pipeline folder here"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_one_sentence(model, options, told):
    with one_sentence(match=told):
        searched(**{"folder": options.pop("model", model)} | options)


# ---------------------------------------------------------------- what a pipeline does with it


def sampler(**options) -> Sampler:
    defaults = {"scheduler": DPM, "scheduler_options": TRAILING, "steps": 4, "class_labels": "balanced"}
    return Sampler(**defaults | {"protocol": "RMSE 1"} | options)


@pytest.fixture
def carrying(own) -> Path:
    """The pipeline folder with learned timesteps, and the sampler that has them as the recommended one."""
    learned = sampler(timesteps=LEARNED)
    recommended = sampler(timesteps=LEARNED, guidance_scale=1.5)
    Samplers(unet_sha256=weights_sha256(own), learned=[learned], recommended=recommended).write(own)
    return own


def loaded(folder: Path, scheduler=diffusers.DPMSolverMultistepScheduler, **options) -> DDPMPipeline:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **TRAILING | options)
    return pipeline


def steps_of(pipeline: DDPMPipeline, **call) -> list[int]:
    pipeline(**{"num_inference_steps": 4, "class_labels": 0, "output_type": "pt"} | call)
    return pipeline.scheduler.timesteps.tolist()


EVEN = [19, 14, 9, 4]


@pytest.mark.parametrize(
    ("plugged", "call", "expected"),
    [
        ({}, {}, LEARNED),
        ({}, {"class_labels": None}, EVEN),
        ({}, {"guidance_scale": 2.0}, EVEN),
        ({}, {"num_inference_steps": 5}, [19, 15, 11, 7, 3]),
        ({}, {"num_inference_steps": None, "timesteps": [19, 3]}, [19, 3]),
        ({}, {"num_inference_steps": None}, list(range(19, -1, -1))),
        ({"solver_order": 3}, {}, EVEN),
        ({"timestep_spacing": "linspace"}, {}, [19, 14, 10, 5]),
        ({"scheduler": DDIMScheduler}, {}, EVEN),
        ({"scheduler": diffusers.DDIMScheduler}, {}, EVEN),
    ],
    ids=str,
)
def test_learned_timesteps_are_taken_in_their_conditions_only(carrying, plugged, call, expected):
    assert steps_of(loaded(carrying, **plugged), **call) == expected


def test_the_protocol_names_learned_timesteps(carrying, own):
    config = GenerateConfig(model=str(carrying), scheduler="dpm++", steps=4, class_labels="balanced")
    assert protocol(config, pipeline_for(config))["timesteps"] == LEARNED
    assert "timesteps" not in protocol(config.replace(steps=5), pipeline_for(config))


def test_the_recommended_sampler_is_plugged_in_by_one_call(carrying, model):
    pipeline = DDPMPipeline.from_pretrained(carrying)
    options = pipeline.use_recommended_sampler()
    assert options == {"timesteps": LEARNED, "guidance_scale": 1.5}
    assert steps_of(pipeline, num_inference_steps=None, **options) == LEARNED
    assert type(pipeline.scheduler).__name__ == DPM and pipeline.scheduler.config.timestep_spacing == "trailing"
    with one_sentence(match="carries no recommended sampler"):
        DDPMPipeline.from_pretrained(model).use_recommended_sampler()


def test_saving_writes_it_again_and_only_beside_the_same_weights(carrying, tmp_path, capsys):
    pipeline = DDPMPipeline.from_pretrained(carrying)
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "samplers.json").read_bytes() == (carrying / "samplers.json").read_bytes()
    assert DDPMPipeline.from_pipe(pipeline).samplers == pipeline.samplers is not None
    with torch.no_grad():
        pipeline.unet.conv_out.weight.zero_()
    pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "samplers.json").exists()
    shutil.copyfile(carrying / "samplers.json", tmp_path / "saved" / "samplers.json")
    assert DDPMPipeline.from_pretrained(tmp_path / "saved").samplers is None
    assert "was made for other weights than those of" in capsys.readouterr().out
    assert DDPMPipeline.from_pretrained(carrying, unet=pipeline.unet).samplers is None


def test_parts_at_the_root_of_a_folder_are_compared_too(carrying, capsys):
    move_to_root(carrying)
    assert DDPMPipeline.from_pretrained(carrying).samplers is not None
    values = json.loads((carrying / "samplers.json").read_text())
    values["unet_sha256"] = dict.fromkeys(values["unet_sha256"], "0" * 64)
    (carrying / "samplers.json").write_text(json.dumps(values))
    assert DDPMPipeline.from_pretrained(carrying).samplers is None
    assert "was made for other weights than those of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"unet_sha256": 3}', '{"unet_sha256": {}, "learned": [{"steps": 0}]}', '{"more": 1}']
)
def test_a_damaged_file_is_one_sentence(own, text):
    (own / "samplers.json").write_text(text)
    with one_sentence(match=r"samplers\.json"):
        DDPMPipeline.from_pretrained(own)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheduler": "DiffusionPipeline"}, "scheduler='DiffusionPipeline' is none of this package or of diffusers"),
        ({"scheduler_options": {"return_unused_kwargs": True}}, "scheduler_options='return_unused_kwargs' is unknown"),
    ],
    ids=str,
)
def test_a_scheduler_that_cannot_be_made_is_one_sentence(own, changes, told):
    Samplers(unet_sha256=weights_sha256(own), recommended=sampler(**changes)).write(own)
    with one_sentence(match=told):
        DDPMPipeline.from_pretrained(own).use_recommended_sampler()


@pytest.mark.slow
@pytest.mark.xdist_group("hub")
def test_it_travels_over_the_hub_and_the_code_of_the_card_works_as_it_stands(carrying, tmp_path):
    code = """
import re, sys
from huggingface_hub import hf_hub_download
from ddpm_pipe import DDPMPipeline
own = DDPMPipeline.from_pretrained(sys.argv[1])
own.push_to_hub("org/carrying")
assert DDPMPipeline.from_pretrained("org/carrying").samplers == own.samplers
card = open(hf_hub_download("org/carrying", "README.md")).read()
assert "timesteps=[19, 9, 4, 1]" in card and "of those within 5 % of the best: RMSE 1." in card
with_package, diffusers_alone = re.findall("```python\\n(.*?)```", card, re.DOTALL)
for code in with_package, diffusers_alone:
    exec(code)
    print(type(pipeline).__module__, pipeline.scheduler.timesteps.tolist()[:4])
"""
    with HubServer(tokens={"hf_good": "org"}) as hub:
        environment = os.environ | hub.environment(token="hf_good", home=tmp_path)
        environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-c", code, str(carrying)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, alone = done.stdout.splitlines()[-2:]
    assert ours == "ddpm_pipe.pretrained [19, 18, 17, 16]"  # the last call of that code takes all steps
    assert alone.startswith("diffusers_modules") and alone.endswith(str(LEARNED))


def test_the_card_of_a_stock_pipeline_spaces_the_steps_evenly_in_diffusers(carrying):
    pipeline = DDPMPipeline(stock_unet(), DDPMScheduler(20))
    pipeline.save_pretrained(carrying)
    learned = sampler(timesteps=LEARNED, class_labels=None)
    for scheduler, expected in ((DPM, "num_inference_steps=4)"), ("EulerDiscreteScheduler", "num_inference_steps=20)")):
        recommended = learned.replace(scheduler=scheduler)
        carried = Samplers(unet_sha256=weights_sha256(carrying), learned=[learned], recommended=recommended)
        carried.write(carrying)
        card = make_card(None, carrying, "org/stock").text
        assert expected in card.split("With diffusers alone")[1].split("```")[1]
        assert "spaces them evenly" in card and ("diffusers import DiffusionPipeline, D" in card) is (scheduler == DPM)


# ---------------------------------------------------------------- which one is recommended


def point(steps: int, value: float, calls: int = 0, model: str = "m") -> Point:
    metrics = [Metric("fid", "FID-20", value, "")]
    return Point(Path(model), {"steps": steps}, {}, sampler(steps=steps), calls or steps, 0.0, metrics)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([point(10, 3.0), point(20, 2.9), point(50, 2.8)], 20),  # 3.0 is more than 5 % above 2.8
        ([point(10, 2.94), point(20, 2.9), point(50, 2.8)], 10),
        ([point(10, 2.8), point(20, 2.9)], 10),
        ([point(5, 2.8, calls=10), point(6, 2.9)], 6),  # guidance costs two calls in a step
        ([point(9, 2.85, calls=6), point(6, 2.8)], 6),  # of as many calls the better one
        ([point(10, 2.8), point(2, 2.7, model="other")], None),
        ([point(10, 2.8)], None),
        ([point(10, 2.8), point(20, float("inf"))], None),
    ],
)
def test_the_fewest_calls_within_5_percent_of_the_best_are_recommended(points, expected):
    found = Results(Path("m"), {}, {}, points, []).recommended(Path("m"))
    assert (found and found.steps) == expected
    if found:
        assert f"FID-20 {min(p.distance for p in points if p.sampler.steps == expected):.4g}" in found.protocol


def test_only_json_values_are_kept(carrying):
    assert set(json.loads((carrying / "samplers.json").read_text())) == {"unet_sha256", "learned", "recommended"}
