"""Images by the thousand: each from its seed alone, in files that no kill leaves half-written."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from conftest import one_sentence
from PIL import Image
from runs import REPO, run_on_two
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import ddpm_pipe
from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.config import parse
from ddpm_pipe.data.memory import load_images
from ddpm_pipe.sampling.config import ALIASES, SCHEDULERS, GenerateConfig, parse_seeds
from ddpm_pipe.sampling.generate import FORMATS, generate
from ddpm_pipe.sampling.protocol import pipeline_for, protocol, sample_images
from ddpm_pipe.weights import weights_sha256

SIZE, CLASSES, STEPS = 8, 3, 20
NETWORKS = {
    "plain": {},
    "classes": {"num_class_embeds": CLASSES},
    "self-conditioned": {"self_condition": True},
    "learned variance": {"out_channels": 6},
    "grey": {"in_channels": 1, "out_channels": 1},
}


def make_model(folder: Path, scheduler=None, **options) -> str:
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16), "norm_num_groups": 4, "num_attention_heads": 2, "attention_head_dim": 4}
    learned = {"variance_type": "learned_range"} if options.get("out_channels") == 6 else {}
    own = scheduler or DDPMScheduler(STEPS, beta_schedule="cosine", **learned)
    DDPMPipeline(DDPMUNet2DModel(sample_size=SIZE, **small, **options), own).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Pipeline folders by kind of network."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, **options) for name, options in NETWORKS.items()}


@pytest.fixture
def config(models, tmp_path, fresh_accelerate):
    """The images of some seeds in a folder of this test."""

    def make(kind: str = "plain", folder: str = "images", **options) -> GenerateConfig:
        defaults = {"seeds": "0-9", "steps": 4, "output_dir": str(tmp_path / folder), "batch_size": 4, "shard_size": 4}
        return GenerateConfig(model=models[kind], **(defaults | options))

    return make


def draw(config: GenerateConfig, seeds: list[int] | None = None) -> dict[int, torch.Tensor]:
    """Seed -> uint8 image (C, H, W), in memory."""
    batches = sample_images(
        pipeline_for(config), seeds or parse_seeds(config.seeds), config.batch_size, **config.call_options()
    )
    return {seed: image for drawn, images, _ in batches for seed, image in zip(drawn, images, strict=True)}


def read(folder: Path) -> dict[int, torch.Tensor]:
    """Seed -> uint8 image (C, H, W), from the files of any format; a seed is in one of them only."""
    files = [(path.stem, path.read_bytes()) for path in folder.glob("*.png")]
    for path in folder.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            files += [(Path(name).stem, archive.read(name)) for name in archive.namelist()]
    for path in folder.glob("*.parquet"):
        table = datasets.Dataset.from_parquet(str(path), keep_in_memory=True, cache_dir=str(folder / "cache"))
        table = table.cast_column("image", datasets.Image(decode=False))
        files += [(row["seed"], row["image"]["bytes"]) for row in table]
    seeds = [int(seed) for seed, _ in files]
    assert len(set(seeds)) == len(seeds)
    arrays = [np.asarray(Image.open(io.BytesIO(data))) for _, data in files]
    images = [torch.from_numpy(array.reshape(SIZE, SIZE, -1).copy()).permute(2, 0, 1) for array in arrays]
    return dict(sorted(zip(seeds, images, strict=True)))


def assert_same_images(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> None:
    """The same seeds, and the same pixels but for a few that were rounded to the next level."""
    assert first.keys() == second.keys()
    a, b = (torch.stack([images[seed] for seed in first]).int() for images in (first, second))
    assert (a - b).abs().max() <= 1 and (a == b).float().mean() > 0.99


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """File name -> what changes when it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("[!.]*[0-9].*")}


def refused(message: str):
    """Expect a ValueError of one line that matches the message."""
    return pytest.raises(ValueError, match=rf"\A[^\n]*{message}[^\n]*\Z")


# ---------------------------------------------------------------- an image depends on its seed alone


@pytest.mark.parametrize("kind", NETWORKS)
def test_batches_of_1_and_64_draw_the_same_images(config, kind):
    labels = {"class_labels": "balanced", "guidance_scale": 2.0} if kind == "classes" else {}
    one, many = (draw(config(kind, batch_size=size, **labels)) for size in (1, 64))
    assert_same_images(one, many)
    assert len({image.numpy().tobytes() for image in many.values()}) == 10


@pytest.mark.parametrize("scheduler", ALIASES)
def test_every_scheduler_draws_seed_7_alone_as_among_others(config, scheduler):
    chosen = config(scheduler=scheduler, batch_size=64)
    alone, among = draw(chosen, [7]), draw(chosen, [3, 7, 5])
    assert_same_images(alone, {7: among[7]})
    assert among[3].ne(among[5]).any()


def test_all_noise_of_an_image_is_that_of_its_generator(config):
    """DDIM with eta = 1 has noise in each step; the pipeline called by itself is the reference."""
    chosen = config(scheduler="ddim", eta=1.0)
    pipeline = DDPMPipeline.from_pretrained(chosen.model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(generator=torch.Generator().manual_seed(7), num_inference_steps=4, eta=1.0).images[0]
    assert_same_images(draw(chosen, [7]), {7: torch.from_numpy(np.array(image)).permute(2, 0, 1)})
    torch.manual_seed(1)  # the generator of the process has no part in it
    assert_same_images(draw(chosen, [7, 8]), draw(chosen, [7, 8]))


def test_in_memory_there_are_the_images_of_the_files(config):
    chosen = config()
    assert_same_images(draw(chosen), read(generate(chosen)))


# ---------------------------------------------------------------- processes


def run_in_child(config: GenerateConfig) -> None:
    torch.set_num_threads(1)
    generate(config)


def test_a_model_that_is_nowhere_is_one_sentence():
    with one_sentence(match=r"model='no/such/folder' is neither a folder here nor the id"):
        pipeline_for(GenerateConfig(model="no/such/folder"))


@pytest.mark.slow
@pytest.mark.parametrize("output_format", FORMATS)
def test_two_processes_draw_the_images_of_one(config, output_format):
    one = generate(config(folder="one", output_format=output_format))
    two = config(folder="two", output_format=output_format)
    run_on_two(run_in_child, two)
    assert_same_images(read(one), read(Path(two.output_dir)))
    assert stamps(one).keys() == stamps(Path(two.output_dir)).keys()


def die(number: int, moment: str) -> None:
    """Let this process be killed at its rename of image files of that number: with half a file, or before or after."""
    replace, count = Path.replace, 0

    def replace_or_die(path: Path, target: Path) -> Path:
        nonlocal count
        count += path.name != ".generation.json.new"
        if count < number or (number > 0 and path.name == ".generation.json.new"):
            return replace(path, target)
        if moment == "half":
            os.truncate(path, path.stat().st_size // 2)
        elif moment == "after":
            replace(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")

    Path.replace = replace_or_die


def run_and_die(config: GenerateConfig, number: int, moment: str) -> None:
    die(number, moment)
    run_in_child(config)


def start(function, *arguments) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half", "before", "after"])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("output_format", FORMATS)
def test_killed_in_any_write_it_goes_on_with_whole_files_and_draws_none_twice(config, output_format, number, moment):
    """Number 0 is the write of generation.json."""
    whole = read(generate(config(folder="whole", output_format=output_format)))
    chosen = config(output_format=output_format)
    folder = Path(chosen.output_dir)
    killed = start(run_and_die, chosen, number, moment)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    before = stamps(folder)
    assert len(before) == max(0, number - (moment != "after"))
    assert set(read(folder)) < set(whole)  # what is there is whole
    generate(chosen)
    assert stamps(folder).items() >= before.items()
    assert_same_images(read(folder), whole)
    assert not list(folder.glob(".*"))


def lose_the_second(config: GenerateConfig) -> None:
    if os.environ["RANK"] == "1":
        die(1, "half")
    run_in_child(config)


@pytest.mark.slow
@pytest.mark.parametrize("output_format", FORMATS)
def test_begun_on_two_processes_it_goes_on_with_one_and_other_batches(config, output_format):
    chosen = config(output_format=output_format)
    folder = Path(chosen.output_dir)
    with pytest.raises(ChildFailedError):
        run_on_two(lose_the_second, chosen)
    before = stamps(folder)
    assert len(read(folder)) < 10
    generate(config(output_format=output_format, batch_size=64, shard_size=3))
    assert stamps(folder).items() >= before.items() and not list(folder.glob(".*"))
    assert_same_images(read(folder), draw(chosen))


@pytest.mark.slow
@pytest.mark.parametrize("output_format", FORMATS)
def test_killed_again_and_again_at_any_time_it_comes_to_its_end(config, output_format):
    chosen = config(output_format=output_format, seeds="0-19", batch_size=2, shard_size=3)
    folder, before, kills = Path(chosen.output_dir), {}, 0
    delays = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 0.5
    for delay in delays.tolist():
        process = start(run_in_child, chosen)
        files = len(before)
        while process.is_alive() and len(stamps(folder)) == files:  # it gets somewhere in each of its lives
            time.sleep(0.001)
        process.join(delay / 10)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        now = stamps(folder)
        assert now.items() >= before.items()
        before = now
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills > 2
    assert_same_images(read(folder), draw(chosen))


def test_a_finished_folder_is_left_as_it_is(config, capsys):
    folder = generate(config())
    before = stamps(folder)
    generate(config())
    assert stamps(folder) == before
    assert "10 images in " in capsys.readouterr().out


def test_what_a_kill_left_half_written_is_removed_and_nothing_else(config):
    chosen = config()
    folder = Path(chosen.output_dir)
    folder.mkdir()
    for name in (".000042.png.new", ".000000-000041.zip.new", ".000000-000041.parquet.new", ".mine", ".mine.png.new"):
        (folder / name).write_bytes(b"half")
    generate(chosen)
    assert {path.name for path in folder.glob(".*")} == {".mine", ".mine.png.new"}


def test_without_a_kill_a_failure_leaves_nothing_half_written(config, monkeypatch):
    chosen = config(output_format="zip")
    calls = []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        return written(*arguments)

    written = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", full_disk)
    with pytest.raises(OSError, match="No space left"):
        generate(chosen)
    assert set(os.listdir(chosen.output_dir)) == {"000000-000003.zip", "generation.json"}


# ---------------------------------------------------------------- going on with other settings


@pytest.mark.parametrize("output_format", FORMATS)
def test_seeds_are_added_and_the_others_left_alone(config, output_format):
    folder = generate(config(output_format=output_format, seeds="0-5"))
    before = stamps(folder)
    generate(config(output_format=output_format, seeds="0-5,7,20-22", batch_size=1, shard_size=2))
    assert stamps(folder).items() >= before.items()
    assert json.loads((folder / "generation.json").read_text())["seeds"] == "0-5,7,20-22"
    assert_same_images(read(folder), draw(config(seeds="0-5,7,20-22")))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 5}, "holds images of steps=4, not 5; choose another folder, or the same settings"),
        ({"eta": 0.5}, "holds images of eta=0.0, not 0.5"),
        ({"scheduler": "ddpm"}, "holds images of scheduler.class='DDIMScheduler', not 'DDPMScheduler'"),
        (
            {"scheduler_options": {"timestep_spacing": "leading"}},
            "scheduler.timestep_spacing='trailing', not 'leading'",
        ),
        ({"guidance_scale": 2.0}, "holds images of guidance_scale=1.0, not 2.0"),
        ({"class_labels": "0,1"}, "holds images of class_labels='balanced', not '0,1'"),
        ({"dtype": "bfloat16"}, "holds images of dtype='float32', not 'bfloat16'"),
        ({"output_format": "zip"}, "holds images of output_format='png', not 'zip'"),
        ({"seeds": "1-9"}, "holds images of seeds='0-2', which are not all in '1-9'"),
        ({"kind": "other"}, "holds images of unet_sha256.diffusion_pytorch_model.safetensors='"),
    ],
    ids=str,
)
def test_images_of_other_settings_are_not_mixed(config, models, tmp_path, other, message):
    options = {"kind": "classes", "class_labels": "balanced", "scheduler": "ddim", "seeds": "0-2"}
    folder = generate(config(**options))
    before = (folder / "generation.json").read_bytes()
    if "kind" in other:
        network = DDPMPipeline.from_pretrained(models["classes"])
        network.unet.conv_out.bias.data += 0.1
        network.save_pretrained(tmp_path / "other")
        models = models | {"other": str(tmp_path / "other")}
        with refused(message):
            generate(config(**options).replace(model=models["other"]))
    else:
        with refused(message):
            generate(config(**options | other))
    assert (folder / "generation.json").read_bytes() == before and len(read(folder)) == 3


def test_the_same_model_elsewhere_is_the_same(config, models, tmp_path):
    folder = generate(config(seeds="0-2"))
    (tmp_path / "moved").symlink_to(models["plain"])
    generate(config().replace(model=str(tmp_path / "moved")))
    assert len(read(folder)) == 10


def test_all_versions_that_drew_images_are_told(config):
    folder = generate(config(seeds="0-2"))
    file = folder / "generation.json"
    entries = json.loads(file.read_text())
    now = entries["versions"][0]
    older = now | {"torch": "2.6.0"}
    file.write_text(json.dumps(entries | {"versions": [older]}))
    for seeds in ("0-3", "0-4"):
        generate(config(seeds=seeds))
    assert json.loads(file.read_text())["versions"] == [older, now]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"seeds": "0-2"}', '{"seeds": null, "versions": []}', '{"seeds": "x", "versions": []}']
)
def test_a_damaged_protocol_is_one_sentence_and_no_image_is_lost(config, text):
    folder = generate(config(seeds="0-2"))
    (folder / "generation.json").write_text(text)
    with refused("generation.json is damaged .*; choose another folder"):
        generate(config(seeds="0-3"))
    assert len(read(folder)) == 3


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_damaged_file_is_named(config, output_format, size):
    folder = generate(config(output_format=output_format, seeds="0-5", shard_size=3))
    file = folder / ("000002.png" if output_format == "png" else f"000000-000002.{output_format}")
    file.write_bytes(file.read_bytes()[:size])
    with refused(f"{file.name} is damaged .*; delete it, and its images are drawn again"):
        generate(config(output_format=output_format, seeds="0-5", shard_size=3))
    file.unlink()
    generate(config(output_format=output_format, seeds="0-5", shard_size=3))
    assert len(read(folder)) == 6


def test_images_of_unknown_origin_are_not_gone_on_with(config):
    folder = generate(config())
    (folder / "generation.json").unlink()
    with refused("holds images but no generation.json; choose another folder"):
        generate(config())


def test_settings_that_drew_no_image_do_not_bind(config):
    folder = generate(config(seeds="0-2"))
    for path in folder.glob("*.png"):
        path.unlink()
    generate(config(seeds="5", steps=5))
    assert list(read(folder)) == [5]
    assert json.loads((folder / "generation.json").read_text())["steps"] == 5


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("output_format", ["zip", "parquet"])
def test_shards_hold_the_images_of_the_png_folder(config, output_format):
    shards = generate(config(folder="shards", output_format=output_format))
    names = {f"{first:06d}-{last:06d}.{output_format}" for first, last in ((0, 3), (4, 7), (8, 9))}
    assert set(stamps(shards)) == names
    assert_same_images(read(generate(config(folder="flat"))), read(shards))


@pytest.mark.parametrize("output_format", ["png", "parquet"])
@pytest.mark.parametrize("kind", ["classes", "grey"])
def test_our_own_training_reads_the_folder(config, monkeypatch, tmp_path, output_format, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chosen = config(kind, output_format=output_format, class_labels="2,0" if kind == "classes" else None)
    data = load_images(str(generate(chosen)), with_labels=kind == "classes" and output_format == "parquet")
    assert data.shape == ((3 if kind == "classes" else 1), SIZE, SIZE)
    assert_same_images(dict(enumerate(data.images)), draw(chosen))
    if data.labels is not None:
        assert data.labels.tolist() == [2, 0] * 5 and data.class_names == ("0", "1", "2")


def test_parquet_has_image_seed_and_label(config, tmp_path):
    folder = generate(config("classes", output_format="parquet", class_labels="balanced", seeds="5-7"))
    table = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", cache_dir=tmp_path / "cache")["train"]
    assert table["seed"][:] == [5, 6, 7] and table["label"][:] == [2, 0, 1]
    assert table.features["label"].num_classes == CLASSES and isinstance(table[0]["image"], Image.Image)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(("rule", "expected"), [("balanced", [0, 1, 2, 0]), ("2,0", [2, 0, 2, 0]), ("1", [1] * 4)])
def test_the_label_of_an_image_is_a_function_of_its_seed(config, rule, expected):
    chosen = config("classes", class_labels=rule, guidance_scale=2.0)
    pipeline, options = pipeline_for(chosen), chosen.call_options()
    drawn = [label for _, _, labels in sample_images(pipeline, [0, 1, 2, 3], 3, **options) for label in labels]
    assert drawn == expected
    for _, images, labels in sample_images(pipeline, [3], 1, **options):
        assert labels == expected[3:]
        alone = draw(config("classes", class_labels=str(expected[3]), guidance_scale=2.0), [3])
        assert_same_images({3: images[0]}, alone)


def test_a_guide_has_its_part_in_the_images_and_in_their_protocol(config, models, tmp_path):
    weaker = DDPMPipeline.from_pretrained(models["plain"])
    for parameter in weaker.unet.parameters():
        parameter.data *= 0.9
    weaker.save_pretrained(tmp_path / "weaker")
    guided = config(guide=str(tmp_path / "weaker"), guidance_scale=2.0)
    folder = generate(guided)
    written = json.loads((folder / "generation.json").read_text())
    assert written["guide"] == "weaker" and written["guide_sha256"] == weights_sha256(tmp_path / "weaker")

    pipeline = DDPMPipeline.from_pretrained(models["plain"])
    pipeline.guide = weaker.unet
    ((_, images, _),) = sample_images(pipeline, [0, 1], 2, num_inference_steps=4, guidance_scale=2.0)
    assert_same_images(draw(guided, [0, 1]), dict(enumerate(images)))
    assert not torch.equal(images[0], draw(config(), [0])[0])
    with refused("holds images of guide_sha256.diffusion_pytorch_model"):
        generate(guided.replace(guide=models["plain"]))


def test_a_guide_of_other_noise_levels_is_refused(config, models, tmp_path):
    other = DDPMPipeline.from_pretrained(models["plain"])
    other.scheduler = DDPMScheduler.from_config(other.scheduler.config, beta_schedule="linear", beta_end=0.03)
    other.save_pretrained(tmp_path / "other")
    with refused("guide='.*other' was trained for other noise levels than the model"):
        generate(config(guide=str(tmp_path / "other"), guidance_scale=2.0))


def test_labels_have_their_part_in_the_images(config):
    without, labelled, guided = (
        draw(config("classes", **options), [1])[1]
        for options in ({}, {"class_labels": "1"}, {"class_labels": "1", "guidance_scale": 3.0})
    )
    assert without.ne(labelled).any() and labelled.ne(guided).any()


# ---------------------------------------------------------------- schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_by_name_have_the_chain_of_the_model(config, name):
    scheduler = pipeline_for(config(scheduler=name)).scheduler
    ours = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
    class_name = SCHEDULERS[name][0]
    assert type(scheduler) is (ours.get(class_name) or getattr(diffusers, class_name))
    expected = DDPMScheduler(STEPS, beta_schedule="cosine").alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, rtol=0, atol=1e-4)
    if class_name != "DPMSolverSinglestepScheduler":  # it has no such key
        assert scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    ("options", "spacing"),
    [
        ({}, "leading"),
        ({"scheduler": "euler"}, "trailing"),
        ({"scheduler": "euler", "steps": None}, "leading"),
        ({"scheduler": "euler", "steps": STEPS}, "leading"),
        ({"scheduler": "euler", "scheduler_options": {"timestep_spacing": "linspace"}}, "linspace"),
        ({"scheduler_options": {"timestep_spacing": "trailing"}}, "trailing"),
    ],
    ids=str,
)
def test_fewer_steps_of_a_named_scheduler_start_at_pure_noise(config, options, spacing):
    assert pipeline_for(config(**options)).scheduler.config.timestep_spacing == spacing


def test_options_win_over_those_that_the_name_implies(config):
    assert pipeline_for(config(scheduler="dpm++sde")).scheduler.config.algorithm_type == "sde-dpmsolver++"
    options = {"algorithm_type": "dpmsolver++", "solver_order": 3}
    scheduler = pipeline_for(config(scheduler="dpm++sde", scheduler_options=options)).scheduler
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 3)


def test_a_zero_terminal_snr_is_not_lost(models, tmp_path, config):
    own = DDPMScheduler(STEPS, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    chosen = config().replace(model=make_model(tmp_path / "zero", own))
    pipeline_for(chosen.replace(scheduler="dpm++"))
    with refused("HeunDiscreteScheduler has other noise levels than the model was trained with"):
        pipeline_for(chosen.replace(scheduler="heun"))


# ---------------------------------------------------------------- the protocol


def test_generation_json_has_all_that_decides_about_the_images(config, models):
    options = {"scheduler": "dpm++", "class_labels": "balanced", "guidance_scale": 1.5, "seeds": "3,5-6"}
    chosen = config("classes", **options)
    entries = json.loads((generate(chosen) / "generation.json").read_text())
    weights = Path(models["classes"], "unet", "diffusion_pytorch_model.safetensors").read_bytes()
    assert entries["unet_sha256"] == {"diffusion_pytorch_model.safetensors": hashlib.sha256(weights).hexdigest()}
    scheduler = entries.pop("scheduler")
    assert scheduler["class"] == "DPMSolverMultistepScheduler" and scheduler["algorithm_type"] == "dpmsolver++"
    assert scheduler["timestep_spacing"] == "trailing" and scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert entries == entries | {
        "model": "classes",
        "steps": 4,
        "eta": 0.0,
        "guidance_scale": 1.5,
        "class_labels": "balanced",
        "label_of_an_image": "entry seed % 3, from 0, of the classes 0 to 2",
        "dtype": "float32",
        "output_format": "png",
        "seeds": "3,5-6",
    }
    (versions,) = entries["versions"]
    assert versions == {
        "ddpm_pipe": ddpm_pipe.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def test_it_is_there_before_the_first_image(config, monkeypatch):
    chosen, there = config(), []

    def write(*arguments):
        there.append(Path(chosen.output_dir, "generation.json").exists())

    monkeypatch.setitem(FORMATS, "png", FORMATS["png"]._replace(write=write))
    generate(chosen)
    assert there == [True] * 3


def test_an_infinite_number_of_a_scheduler_is_a_text_and_no_reason_not_to_go_on(config):
    file = generate(config(scheduler="dpm++", seeds="0-1")) / "generation.json"
    text = file.read_text()
    assert '"-Infinity"' in text
    file.write_text(text.replace('"-Infinity"', "-Infinity"))  # as earlier versions wrote it, which is no JSON
    generate(config(scheduler="dpm++", seeds="0-2"))
    assert '"-Infinity"' in file.read_text()


def test_all_steps_are_their_number(config):
    every = config(steps=None)
    assert protocol(every, pipeline_for(every))["steps"] == STEPS


def test_the_network_computes_in_the_dtype_that_is_asked_for(config):
    pipeline = pipeline_for(config(dtype="bfloat16"))
    assert pipeline.unet.dtype == torch.bfloat16
    difference = draw(config())[0].int() - draw(config(dtype="bfloat16"))[0].int()
    assert 0 < difference.abs().float().mean() < 10


# ---------------------------------------------------------------- what is refused, and the command


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-3", [0, 1, 2, 3]), ("1,5,7-9", [1, 5, 7, 8, 9]), ("4, 2-3,3", [2, 3, 4])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-3", "3-", "5-3", "1,,2", "1.5", "0-9-12", "1" * 19])
def test_other_seeds_are_refused(text):
    with refused("seeds='.*' must be numbers of up to 18 digits and ranges with commas between, as 0-49999"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["0-9999999999", "0-6000000,0-6000000", "5,0-10000000"])
def test_more_seeds_than_fit_into_memory_are_refused(text):
    with refused("are .* images; a folder takes at most 10,000,000"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "dpm"}, "scheduler='dpm' is unknown; use one of ddpm, ddim, dpm\\+\\+"),
        ({"output_format": "jpg"}, "output_format='jpg' must be 'png', 'zip' or 'parquet'"),
        ({"dtype": "int8"}, "dtype='int8' must be 'float32', 'bfloat16' or 'float16'"),
        ({"shard_size": 0}, "shard_size=0 must be greater than or equal to 1"),
        ({"output_dir": ""}, "output_dir='' must have at least 1 character"),
        ({"revision": "main"}, "revision='main' is of a repository on the Hub, and model='.*' a folder"),
        ({"scheduler": "dpm++", "steps": None}, "has no 20 timesteps that fall with timestep_spacing='leading'"),
        ({"scheduler": "pndm", "steps": 2}, "num_inference_steps=2 does not suit PNDMScheduler"),
        (
            {"scheduler": "dpm++", "scheduler_options": {"prediction_type": "sample"}},
            "has prediction_type='sample', but the model predicts 'epsilon'",
        ),
        ({"scheduler": "dpm++", "scheduler_options": {"use_flow_sigmas": True}}, "first timestep"),
        ({"batch_size": 0}, "batch_size=0 must be greater than or equal to 1"),
        ({"seeds": "x"}, "seeds='x' must be"),
        ({"steps": 21}, "steps=21 must lie between 1 and the 20 that the model was trained with"),
        ({"steps": 0}, "steps=0 must be greater than or equal to 1"),
        ({"eta": 0.5}, "eta=0.5 has no meaning for DDPMScheduler"),
        ({"eta": 2.0, "scheduler": "ddim"}, "eta=2.0 must lie between 0"),
        ({"class_labels": "balanced"}, "class_labels='balanced' needs a network with classes; this one has none"),
        ({"guidance_scale": 2.0}, "guidance_scale one or a guide"),
        ({"kind": "classes", "guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"guide": "here"}, "guide='here' needs a guidance_scale other than 1"),
        ({"guide": "/nowhere", "guidance_scale": 2.0}, "guide='/nowhere' is neither a folder here nor the id"),
        ({"kind": "classes", "class_labels": "0,3"}, "class_labels='0,3' must be balanced, or classes from 0 to 2"),
        ({"kind": "classes", "class_labels": "cat"}, "class_labels='cat' must be balanced, or classes from 0 to 2"),
        (
            {"scheduler_options": {"solver_order": 3}},
            "scheduler_options='solver_order' is unknown; use one of num_train",
        ),
        (
            {"scheduler": "dpm++", "scheduler_options": {"algorithm_type": "x"}},
            "do not suit DPMSolverMultistepScheduler",
        ),
        (
            {"scheduler": "heun", "scheduler_options": {"timestep_spacing": "x"}},
            "do not suit HeunDiscreteScheduler: x is not",
        ),
        ({"scheduler": "ddim", "scheduler_options": {"trained_betas": [0.1] * STEPS}}, "other noise levels"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence_and_leaves_no_folder(config, tmp_path, options, message):
    with refused(message):
        generate(config(**options))
    assert not (tmp_path / "images").exists()


def test_a_prediction_that_the_scheduler_does_not_know_is_one_sentence(models, tmp_path, config):
    own = DDPMScheduler(STEPS, prediction_type="sample")
    chosen = config(scheduler="euler_a").replace(model=make_model(tmp_path / "x0", own))
    with refused("EulerAncestralDiscreteScheduler cannot sample this model with these options: prediction_type"):
        generate(chosen)


def test_weights_that_are_not_finite_draw_nothing(models, tmp_path, config):
    pipeline = DDPMPipeline.from_pretrained(models["plain"])
    pipeline.unet.conv_out.bias.data[:] = float("nan")
    pipeline.save_pretrained(tmp_path / "broken")
    with refused("'conv_out.bias' of .*unet has NaN or infinite entries"):
        generate(config().replace(model=str(tmp_path / "broken")))
    assert not list((tmp_path / "images").glob("*.png"))


def test_a_folder_that_cannot_be_written_is_one_sentence(config, tmp_path):
    (tmp_path / "images").write_text("a file")
    with refused("output_dir='.*images' cannot be written: File exists"):
        generate(config())


def test_the_bar_counts_the_images_that_are_drawn(config, capsys):
    generate(config(seeds="0-3"))
    generate(config(seeds="0-9"))
    last = capsys.readouterr().err.split("\r")[-1]
    assert "images: 100%" in last and "6/6" in last and "images/s" in last


def test_a_config_file_is_read_back(config, tmp_path):
    chosen = config(seeds="7", scheduler="dpm++", scheduler_options={"solver_order": 3})
    (tmp_path / "config.yaml").write_text(chosen.to_yaml())
    assert parse(GenerateConfig, [str(tmp_path / "config.yaml")]) == chosen
    (tmp_path / "bare.yaml").write_text("model: org/name\nseeds: 7\nclass_labels: 3\n")
    bare = parse(GenerateConfig, [str(tmp_path / "bare.yaml")])
    assert (bare.seeds, bare.class_labels) == ("7", "3")


@pytest.mark.slow
def test_the_command_of_the_readme(config):
    chosen = config(seeds="0-4", scheduler="dpm++")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "ddpm_pipe", "generate"]
    command += ["--model", chosen.model, "--seeds", "0-4", "--output_dir", chosen.output_dir]
    command += ["--scheduler", "dpm++", "--steps", "4"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_images(read(Path(chosen.output_dir)), draw(chosen))
