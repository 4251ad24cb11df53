"""Conversion: the packages that trained a checkpoint draw the same images from the same noise, and what is refused."""

import json
import math
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import one_sentence
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from pypi import importable, load, unpacked
from runs import move_to_root
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMUNet2DModel
from ddpm_pipe.convert.command import FAMILIES, convert
from ddpm_pipe.convert.config import ConvertConfig
from ddpm_pipe.weights import weights_sha256

pytestmark = [
    pytest.mark.xdist_group("packages"),  # one worker downloads them
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SIZE, STEPS = 8, 20


@pytest.fixture(scope="session")
def cache(request) -> Path:
    return request.config.cache.mkdir("packages")


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """`network` in eval mode with every weight moved off its initial value, those that start as zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def converted(tmp_path: Path, checkpoint, **options) -> DDPMPipeline:
    """The pipeline of a checkpoint, as it is loaded from the folder that `convert` writes."""
    torch.save(checkpoint, tmp_path / "model.pt")
    config = ConvertConfig(
        source=str(tmp_path / "model.pt"), output_dir=str(tmp_path / "out"), **{"image_size": [SIZE], **options}
    )
    convert(config)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: DDPMPipeline, **options) -> torch.Tensor:
    """Two images (2, C, H, W) in [0, 1], of the noise that lucidrains' samplers draw after torch.manual_seed(3)."""
    return pipeline(2, torch.Generator().manual_seed(3), output_type="pt", **options).images


def assert_same_images(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for rounding, which sampling amplifies where the network predicts noise."""
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.05, "clipped images say little"
    torch.testing.assert_close(ours, theirs.clamp(0, 1), rtol=0, atol=2e-4)


# ---------------------------------------------------------------- lucidrains' denoising-diffusion-pytorch

CURRENT = "2.3.4"
LUCIDRAINS = {
    "current": (CURRENT, {}, {}),
    "noise": (CURRENT, {}, {"objective": "pred_noise", "beta_schedule": "cosine", "timesteps": 30}),
    "x0": (CURRENT, {}, {"objective": "pred_x0", "beta_schedule": "linear", "timesteps": 40}),
    "min-snr x0": (CURRENT, {}, {"objective": "pred_x0", "min_snr_loss_weight": True}),
    "min-snr v": (CURRENT, {}, {"objective": "pred_v", "min_snr_loss_weight": True}),
    "min-snr noise": (CURRENT, {}, {"objective": "pred_noise", "min_snr_loss_weight": True}),
    "self-conditioned": (CURRENT, {"self_condition": True, "channels": 1}, {}),
    "full attention": (CURRENT, {"full_attn": (True, False)}, {}),
    "heads per level": (CURRENT, {"attn_heads": (2, 4), "attn_dim_head": (16, 4)}, {}),
    "widths": (CURRENT, {"dim_mults": (2, 3, 3), "init_dim": 24}, {}),
    "one level": (CURRENT, {"dim_mults": (1,)}, {}),
    "learned variance": (CURRENT, {"learned_variance": True}, {}),
    "learned Fourier features": (CURRENT, {"learned_sinusoidal_cond": True}, {}),
    "random Fourier features": ("1.5.8", {"random_fourier_features": True, "learned_sinusoidal_dim": 10}, {}),
    "Fourier features before 1.0": ("0.28.0", {"learned_sinusoidal_cond": True}, {"objective": "pred_noise"}),
    "group norm, rms attention": ("1.11.1", {}, {}),
    "standardised, rms attention": ("1.7.0", {}, {}),
    "rms attention of means": ("1.7.3", {}, {}),
    "rms attention of sums": ("1.7.7", {}, {}),
    "flat names, no memory": ("1.8.0", {"full_attn": (False, True)}, {}),
    "weight-standardised": ("1.5.8", {}, {"objective": "pred_noise"}),
    "weight-standardised, self-conditioned": ("1.5.8", {"self_condition": True}, {"objective": "pred_x0"}),
    "strided convolutions": ("0.28.0", {}, {"objective": "pred_noise", "beta_schedule": "cosine"}),
}


@pytest.fixture(params=LUCIDRAINS)
def lucidrains(request, cache):
    """A version of the package, a diffusion with random weights, and the checkpoint that its Trainer would save."""
    version, unet, options = LUCIDRAINS[request.param]
    package = load("denoising-diffusion-pytorch", version, "denoising_diffusion_pytorch", cache)
    return version, *checkpoint_of(package, version, unet, options)


def checkpoint_of(package, version, unet, options):
    from ema_pytorch import EMA

    torch.manual_seed(0)
    network = package.Unet(16, **{"dim_mults": (1, 2), **unet})
    # GaussianDiffusion refuses Fourier features, which it can sample, by these names
    network.random_or_learned_sinusoidal_cond = network.learned_sinusoidal_cond = False
    kind = package.LearnedGaussianDiffusion if unet.get("learned_variance") else package.GaussianDiffusion
    diffusion = kind(network, image_size=SIZE, **{"timesteps": STEPS, **options})
    ema = EMA(diffusion)
    randomize(diffusion)
    randomize(ema.ema_model, seed=1)
    checkpoint = {
        "step": 10,
        "model": diffusion.state_dict(),
        "opt": torch.optim.Adam(diffusion.parameters()).state_dict(),
        "ema": ema.state_dict(),
        "scaler": None,
        "version": version,
    }
    if version.startswith("0."):
        del checkpoint["version"]
    return {"ema": ema.ema_model, "raw": diffusion}, checkpoint


def needed(version: str, diffusion) -> dict:
    """What older files do not say."""
    return {"objective": diffusion.objective, "version": version} if version.startswith("0.") else {}


def test_lucidrains_checkpoint_draws_its_own_images(lucidrains, tmp_path):
    version, models, checkpoint = lucidrains
    torch.manual_seed(3)
    theirs = models["ema"].p_sample_loop((2, models["ema"].channels, SIZE, SIZE))
    assert_same_images(drawn(converted(tmp_path, checkpoint, **needed(version, models["ema"]))), theirs)


@pytest.fixture(scope="session")
def current(cache):
    return load("denoising-diffusion-pytorch", CURRENT, "denoising_diffusion_pytorch", cache)


@pytest.fixture(scope="session")
def old(cache):
    return load("denoising-diffusion-pytorch", "1.5.8", "denoising_diffusion_pytorch", cache)


@pytest.mark.parametrize("saved", ["by the Trainer", "alone"])
def test_lucidrains_raw_weights_draw_their_own_images(saved, current, tmp_path):
    models, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    torch.manual_seed(3)
    theirs = models["raw"].p_sample_loop((2, 3, SIZE, SIZE))
    if saved == "alone":
        pipeline = converted(tmp_path, checkpoint["model"])
    else:
        pipeline = converted(tmp_path, checkpoint, weights="raw")
    assert_same_images(drawn(pipeline), theirs)


def test_lucidrains_images_need_not_be_square(current, tmp_path):
    models, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    torch.manual_seed(3)
    theirs = models["ema"].p_sample_loop((2, 3, SIZE, 2 * SIZE))
    assert_same_images(drawn(converted(tmp_path, checkpoint, image_size=[SIZE, 2 * SIZE])), theirs)


def test_lucidrains_embedding_of_another_theta_draws_its_own_images(current, tmp_path):
    models, checkpoint = checkpoint_of(current, CURRENT, {"sinusoidal_pos_emb_theta": 50}, {})
    torch.manual_seed(3)
    theirs = models["ema"].p_sample_loop((2, 3, SIZE, SIZE))
    pipeline = converted(tmp_path, checkpoint, sinusoidal_pos_emb_theta=50)
    assert_same_images(drawn(pipeline), theirs)
    assert pipeline.unet.config.time_embedding_theta == 50


# its LearnedGaussianDiffusion cannot sample so
@pytest.mark.parametrize("lucidrains", [name for name in LUCIDRAINS if name != "learned variance"], indirect=True)
def test_lucidrains_implicit_sampling_draws_its_own_images(lucidrains, tmp_path):
    version, models, checkpoint = lucidrains
    diffusion = models["ema"]
    diffusion.sampling_timesteps = 5
    options = {
        "num_inference_steps": 5,
        "eta": diffusion.ddim_sampling_eta,  # 1 before version 1.0
        "use_clipped_model_output": version != "0.28.0" or diffusion.objective != "pred_noise",
    }
    torch.manual_seed(3)
    theirs = diffusion.ddim_sample((2, diffusion.channels, SIZE, SIZE))
    pipeline = converted(tmp_path, checkpoint, **needed(version, diffusion))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert_same_images(drawn(pipeline, **options), theirs)


# ---------------------------------------------------------------- improved-diffusion and guided-diffusion

FLAGS = {"timesteps": 20, "beta_schedule": "linear", "objective": "pred_noise"}
IMPROVED = {
    "plain": ({}, {"num_heads": 1}),
    "heads": ({"num_heads": 2}, {"num_heads": 2}),
    "scale and shift": ({"use_scale_shift_norm": True, "num_heads": 4}, {"num_heads": 4}),
    "learned variance": ({"out_channels": 6}, {"num_heads": 1}),
    "classes": ({"num_classes": 4}, {"num_heads": 1}),
    "one level": ({"channel_mult": (1,), "attention_resolutions": (1,)}, {"num_heads": 1}),
    "deeper": (
        {"num_res_blocks": 2, "channel_mult": (1, 2, 3), "attention_resolutions": (4,), "num_heads": 2},
        {"num_heads": 2},
    ),
    "without attention": ({"attention_resolutions": ()}, {"num_heads": 1}),
    "head width": ({"num_head_channels": 16, "attention_resolutions": (1, 2, 4)}, {"head_dim": 16}),
    "new attention order": (
        {"num_head_channels": 16, "use_new_attention_order": True},
        {"head_dim": 16, "new_attention_order": True},
    ),
    "resampling ResNet blocks": (
        {"resblock_updown": True, "use_scale_shift_norm": True, "attention_resolutions": (2,)},
        {"num_heads": 1},
    ),
}


@pytest.fixture(scope="session")
def guided_unet(cache):
    return load("guided-diffusion-sdk", "1.0.0", "guided_diffusion.unet", cache)


def guided_network(package, **options) -> nn.Module:
    torch.manual_seed(0)
    small = {
        "image_size": SIZE,
        "in_channels": 3,
        "model_channels": 32,
        "out_channels": 3,
        "num_res_blocks": 1,
        "attention_resolutions": (2, 4),
        "channel_mult": (1, 2, 2),
    }
    return randomize(package.UNetModel(**{**small, **options}))


@pytest.mark.parametrize("case", IMPROVED)
@torch.no_grad()
def test_improved_diffusion_network_gives_its_own_output(case, guided_unet, tmp_path):
    options, flags = IMPROVED[case]
    theirs = guided_network(guided_unet, **options)
    ours = converted(tmp_path, theirs.state_dict(), **FLAGS, **flags).unet
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 17])
    labels = torch.tensor([0, 3]) if "num_classes" in options else None
    expected = theirs(x, t, labels) if labels is not None else theirs(x, t)
    output = ours(x, t, class_labels=labels).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_rescaled_timesteps_are_a_table(guided_unet, tmp_path):
    theirs = guided_network(guided_unet)
    flags = {**FLAGS, "timesteps": 40, "rescale_timesteps": True, "num_heads": 1}
    ours = converted(tmp_path, theirs.state_dict(), **flags).unet
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 39])
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t * (1000 / 40)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "variance_type, learned", [("fixed_large", False), ("fixed_small", False), ("learned_range", True)]
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_improved_diffusion_draws_its_own_images(variance_type, learned, schedule, cache, tmp_path):
    folder = unpacked("guided-diffusion-sdk", "1.0.0", cache)
    with importable(folder, "guided_diffusion"):
        unet, sampler = import_module("guided_diffusion.unet"), import_module("guided_diffusion.gaussian_diffusion")
    theirs = guided_network(unet, out_channels=6 if learned else 3)
    diffusion = sampler.GaussianDiffusion(
        betas=sampler.get_named_beta_schedule(schedule, 40),
        model_mean_type=sampler.ModelMeanType.EPSILON,
        model_var_type=sampler.ModelVarType[variance_type.upper()],
        loss_type=sampler.LossType.MSE,
    )
    torch.manual_seed(3)
    expected = diffusion.p_sample_loop(theirs, (2, 3, SIZE, SIZE))
    flags = {**FLAGS, "timesteps": 40, "beta_schedule": schedule, "num_heads": 1}
    pipeline = converted(
        tmp_path, theirs.state_dict(), **flags, **({} if learned else {"variance_type": variance_type})
    )
    assert_same_images(drawn(pipeline), expected / 2 + 0.5)


# ---------------------------------------------------------------- DDPM's PyTorch ports, and google/ddpm-*


@pytest.mark.parametrize(
    "options", [{}, {"ch_mult": (1, 2, 2, 3), "num_res_blocks": 2}, {"attn_resolutions": (4, 2)}], ids=str
)
@pytest.mark.parametrize("saved", ["weights", "DDIM's list"])
@torch.no_grad()
def test_ho_network_gives_its_own_output(options, saved, cache, tmp_path):
    package = load("taming-transformers", "0.0.1", "taming.modules.diffusionmodules.model", cache)
    torch.manual_seed(0)
    small = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "in_channels": 3}
    theirs = randomize(package.Model(resolution=SIZE, **{**small, **options}))
    average = {f"module.{name}": weight for name, weight in theirs.state_dict().items()}
    raw = {name: torch.zeros_like(weight) for name, weight in average.items()}
    checkpoint = average if saved == "weights" else [raw, {}, 3, 1000, average]
    ours = converted(tmp_path, checkpoint, **FLAGS).unet
    x, t = torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 17])
    torch.testing.assert_close(ours(x, t).sample, theirs(x, t), rtol=0, atol=1e-4)


def stock_pipeline(scheduler) -> diffusers.DDPMPipeline:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
        attention_head_dim=None,
    )
    return diffusers.DDPMPipeline(randomize(network), scheduler)


def google(folder: Path, pickled: bool, at_root: bool) -> diffusers.DDPMPipeline:
    """A stock pipeline, saved in `folder`; google/ddpm-cifar10-32 has both parts at its root, pickled or not."""
    stock = stock_pipeline(diffusers.DDPMScheduler(20, variance_type="fixed_large"))
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(folder, safe_serialization=not pickled)
    if at_root:
        move_to_root(folder)
    return stock


def assert_draws_as(stock: diffusers.DDPMPipeline, folder: Path) -> None:
    theirs = stock(2, torch.Generator().manual_seed(3), num_inference_steps=20, output_type="np").images
    assert_same_images(drawn(DDPMPipeline.from_pretrained(folder)), torch.from_numpy(theirs).permute(0, 3, 1, 2))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("at_root", [False, True])
def test_google_ddpm_draws_its_own_images(pickled, at_root, tmp_path):
    stock = google(tmp_path / "stock [a]*", pickled, at_root)
    convert(ConvertConfig(source=str(tmp_path / "stock [a]*"), output_dir=str(tmp_path / "out")))
    assert_draws_as(stock, tmp_path / "out")
    if pickled:
        with one_sentence("has no", "but pickled weights", "ddpm-pipe convert makes safetensors of them"):
            DDPMPipeline.from_pretrained(tmp_path / "stock [a]*")
    else:
        assert_draws_as(stock, tmp_path / "stock [a]*")
        assert weights_sha256(tmp_path / "stock [a]*") == weights_sha256(tmp_path / "out")


def test_attention_of_2022_has_its_names_of_today(tmp_path):
    stock = google(tmp_path / "stock", pickled=False, at_root=True)
    file = tmp_path / "stock" / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(file)
    for today, then in names.items():
        weights = {name.replace(today, then): tensor for name, tensor in weights.items()}
    assert sum(".proj_attn." in name for name in weights) == 8
    save_file(weights, file)
    convert(ConvertConfig(source=str(tmp_path / "stock"), output_dir=str(tmp_path / "out")))
    assert_draws_as(stock, tmp_path / "out")


@pytest.mark.parametrize("pickled", [False, True])
def test_repository_of_the_hub_is_converted(pickled, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    stock = google(tmp_path / "stock", pickled, at_root=True)
    (tmp_path / "stock" / "surprise.bin").write_bytes(b"not needed")
    with HubServer(tokens={"hf_good": "org"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_good")
        api.create_repo("org/stock")
        api.upload_folder(repo_id="org/stock", folder_path=tmp_path / "stock")
        for source, code in (("org/stock", 0), ("org/none", 2), ("org/a/b", 2)):
            command = [sys.executable, "-m", "ddpm_pipe", "convert", "--source", source]
            environment = os.environ | hub.environment(token="hf_good", home=tmp_path / "home")
            command += ["--output_dir", tmp_path / source]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == code, done.stderr
            assert code == 0 or done.stderr.startswith(
                f"ddpm-pipe convert: source='{source}' is no file or folder here"
            )
        fetched = {Path(request.path).name for request in hub.requests if "/resolve/" in request.path}
    suffix = "bin" if pickled else "safetensors"
    assert fetched >= {"model_index.json", f"diffusion_pytorch_model.{suffix}"} and "surprise.bin" not in fetched
    assert_draws_as(stock, tmp_path / "org" / "stock")


def test_pickled_pipeline_of_this_package_is_converted(tmp_path):
    torch.manual_seed(0)
    network = DDPMUNet2DModel(sample_size=SIZE, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=3)
    ours = DDPMPipeline(network.eval(), DDIMScheduler(20, timestep_spacing="trailing"))
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "ours" / "unet" / "diffusion_pytorch_model.bin")
    convert(ConvertConfig(source=str(tmp_path / "ours"), output_dir=str(tmp_path / "out")))
    loaded = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(drawn(loaded, class_labels=1), drawn(ours, class_labels=1))


def test_stock_implicit_scheduler_stays_one(tmp_path):
    stock_pipeline(diffusers.DDIMScheduler(20)).save_pretrained(tmp_path / "stock")
    convert(ConvertConfig(source=str(tmp_path / "stock"), output_dir=str(tmp_path / "out")))
    assert type(DDPMPipeline.from_pretrained(tmp_path / "out").scheduler) is DDIMScheduler


# ---------------------------------------------------------------- what is refused


def refusal(tmp_path, checkpoint, **options) -> str:
    """The one sentence that a conversion ends in, with nothing written."""
    with pytest.raises(ValueError) as error:
        converted(tmp_path, checkpoint, **options)
    assert not (tmp_path / "out").exists()
    message = str(error.value)
    assert message.endswith(".") and "\n" not in message
    return message


def without(checkpoint: dict, *names: str) -> dict:
    return {name: value for name, value in checkpoint.items() if name not in names}


def test_file_of_nothing_known_names_what_is_known(tmp_path):
    message = refusal(tmp_path, {"weight": torch.zeros(1)})
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize("value", [nn.Linear(1, 1), "a string", [], None], ids=repr)
def test_file_that_is_no_state_dict_is_refused(value, tmp_path):
    assert "source" in refusal(tmp_path, value)


def test_file_that_is_not_there_is_no_id_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        convert(ConvertConfig(source="mine/model.pt", output_dir=str(tmp_path / "out")))


def test_damaged_file_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="source"):
        convert(ConvertConfig(source=str(tmp_path / "model.pt"), output_dir=str(tmp_path / "out")))


def test_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        converted(tmp_path, {})
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, "half"], ids=["empty", "huge header", "half"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_file_is_refused_by_name(suffix, content, tmp_path):
    file, weights = tmp_path / f"model{suffix}", {"weight": torch.zeros(100)}
    (save_file if suffix == ".safetensors" else torch.save)(weights, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=rf"\Asource: {re.escape(str(file))}[^\n]*\.\Z"):
        convert(ConvertConfig(source=str(file), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize("length", range(0, 600, 23))
def test_pickle_of_before_torch_1_6_that_is_cut_short_is_refused(length, tmp_path):
    file = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(9), "step": 3}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"\Asource[^\n]*\.\Z"):
        convert(ConvertConfig(source=str(file), output_dir=str(tmp_path / "out")))


class Evil:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("where", ["file", "folder", "folder, at its root"])
def test_pickle_that_would_run_code_is_refused_and_does_not(where, tmp_path):
    mark, source = tmp_path / "executed", tmp_path / "model.pt"
    if where == "file":
        torch.save({"weight": Evil(mark)}, source)
    else:
        source = tmp_path / "stock"
        google(source, pickled=True, at_root="root" in where)
        torch.save({"weight": Evil(mark)}, next(source.rglob("*.bin")))
    with pytest.raises(ValueError, match="whose code could do anything"):
        convert(ConvertConfig(source=str(source), output_dir=str(tmp_path / "out")))
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_folder_that_would_run_code_is_refused_and_does_not(tmp_path):
    mark, folder = tmp_path / "executed", tmp_path / "stock"
    google(folder, pickled=False, at_root=False)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DiffusionPipeline"]}))
    (folder / "scheduler" / "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Pipeline"]}))
    code = f"import diffusers\nopen({str(mark)!r}, 'w')\nclass Pipeline(diffusers.DiffusionPipeline): ...\n"
    (folder / "scheduler" / "evil.py").write_text(code)
    with pytest.raises(ValueError, match="scheduler DiffusionPipeline of diffusers"):
        convert(ConvertConfig(source=str(folder), output_dir=str(tmp_path / "out")))
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_run_folder_is_told_from_its_pipeline(tmp_path):
    google(tmp_path / "run" / "pipeline", pickled=False, at_root=False)
    with pytest.raises(ValueError, match=rf"holds {re.escape(str(tmp_path / 'run' / 'pipeline'))}; give one of these"):
        convert(ConvertConfig(source=str(tmp_path / "run"), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    checkpoint["model"]["model.final_conv.bias"][1] = value
    message = refusal(tmp_path, checkpoint, weights="raw")
    assert "'conv_out.bias'" in message and "NaN or infinite" in message
    assert converted(tmp_path, checkpoint, weights="ema")


@pytest.mark.parametrize(
    "junk",
    [
        {"model": [1, 2]},
        {"ema": torch.zeros(3)},
        {"ema": {1: torch.zeros(1)}},
        {"version": 2.3},
        {"version": None, "ema": None},
    ],
    ids=str,
)
def test_what_lies_beside_the_weights_does_not_end_in_a_traceback(junk, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    try:
        assert converted(tmp_path, checkpoint | junk)
    except ValueError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize(
    "name, value",
    [
        ("betas", torch.tensor(0.1)),
        ("betas", torch.full((STEPS,), math.nan)),
        ("betas", torch.full((STEPS,), 2.0)),
        ("betas", torch.zeros(0)),
        ("loss_weight", torch.zeros(3)),
        ("loss_weight", torch.full((STEPS,), math.nan)),
        ("model.init_conv.weight", torch.zeros(3)),
        ("model.time_mlp.1.weight", torch.tensor(1.0)),
        ("model.downs.0.3.1.weight", torch.zeros(3)),
        ("model.downs.0.2.mem_kv", torch.zeros(3)),
        ("model.downs.0.2.to_out.0.weight", torch.zeros(3)),
        ("model.final_conv.weight", torch.zeros(())),
    ],
    ids=str,
)
def test_weight_of_an_impossible_shape_or_value_is_one_sentence(name, value, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    refusal(tmp_path, {**checkpoint["model"], name: value})


@pytest.mark.parametrize(
    "options, name",
    [
        ({"image_size": None}, "image_size"),
        ({"image_size": [8, 8, 3]}, "image_size"),
        ({"weights": "best"}, "weights.*ema"),
        ({"objective": "pred_u"}, "objective.*pred_v"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_lucidrains_flag_that_is_missing_or_unknown_is_named(options, name, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    assert re.search(name, refusal(tmp_path, checkpoint, **options))


def test_average_that_is_not_there_is_refused(current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    assert "weights" in refusal(tmp_path, checkpoint["model"], weights="ema")


def test_objective_is_needed_where_the_loss_weights_do_not_tell(current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    bare = without(checkpoint["model"], "loss_weight")
    assert "objective" in refusal(tmp_path, bare)
    assert converted(tmp_path, bare, objective="pred_x0").scheduler.config.prediction_type == "sample"


def test_objective_of_learned_variance_is_the_noise(current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {"learned_variance": True}, {})
    assert "pred_noise" in refusal(tmp_path, checkpoint, objective="pred_v")


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("min_snr", [False, True])
def test_objective_other_than_that_of_the_loss_weights_is_refused(min_snr, objective, current, tmp_path):
    options = {"objective": objective, "min_snr_loss_weight": min_snr}
    _, checkpoint = checkpoint_of(current, CURRENT, {}, options)
    for other in {"pred_noise", "pred_x0", "pred_v"} - {objective}:
        message = refusal(tmp_path, checkpoint, objective=other)
        assert f"objective={other!r} is not that of the checkpoint, which is {objective}" in message
    assert converted(tmp_path, checkpoint, objective=objective)


def test_images_that_were_not_brought_to_our_range_are_refused(current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {"auto_normalize": False})
    assert "auto_normalize=False" in refusal(tmp_path, checkpoint, auto_normalize=False)


def test_theta_of_fourier_features_is_refused(current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {"learned_sinusoidal_cond": True}, {})
    assert "sinusoidal_pos_emb_theta=50" in refusal(tmp_path, checkpoint, sinusoidal_pos_emb_theta=50)


def test_version_is_needed_before_1_8(old, tmp_path):
    _, checkpoint = checkpoint_of(old, "1.5.8", {}, {})
    assert "version" in refusal(tmp_path, without(checkpoint, "version"))
    assert "cosine" in refusal(tmp_path, {**checkpoint, "version": "0.27.12"})
    network = converted(tmp_path, without(checkpoint, "version"), version="1.5.8").unet
    assert network.config.weight_standardization and network.config.attention_norm_type == "layer"


@pytest.mark.parametrize(
    "name, what",
    [
        ("model.classes_emb.weight", "classes"),
        ("model.downs.0.2.norm.b", "LayerNorm"),
        ("model.downs.0.0.surprise.weight", "surprise"),
    ],
)
def test_lucidrains_option_without_a_counterpart_is_named(name, what, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    assert what in refusal(tmp_path, {**checkpoint["model"], name: torch.zeros(1)})


def test_unet_without_its_diffusion_is_refused(current, tmp_path):
    models, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    assert "GaussianDiffusion" in refusal(tmp_path, without(checkpoint["model"], "betas"))
    assert "GaussianDiffusion" in refusal(tmp_path, models["raw"].model.state_dict())


@pytest.mark.parametrize("name", ["model.final_conv.weight", "model.mid_block1.block1.proj.bias"])
def test_weight_that_is_missing_is_named(name, current, tmp_path):
    _, checkpoint = checkpoint_of(current, CURRENT, {}, {})
    assert "lacks the weight" in refusal(tmp_path, without(checkpoint["model"], name))


@pytest.mark.parametrize("name", ["timesteps", "beta_schedule", "objective", "num_heads"])
def test_improved_diffusion_needs_what_its_file_does_not_say(name, guided_unet, tmp_path):
    flags = {**FLAGS, "num_heads": 1, name: None}
    assert name in refusal(tmp_path, guided_network(guided_unet).state_dict(), **flags)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"channel_mult": (1, 2, 3)}, "heads of one width"),
        ({"in_channels": 6}, "super-resolution"),
        ({"channel_mult": (2, 2), "attention_resolutions": (2,)}, "channel multiplier"),
        ({"conv_resample": False}, "conv_resample"),
    ],
)
def test_improved_diffusion_option_without_a_counterpart_is_named(options, what, guided_unet, tmp_path):
    network = guided_network(guided_unet, **options)
    assert what in refusal(tmp_path, network.state_dict(), **FLAGS, num_heads=2)


def test_other_pipelines_of_diffusers_are_refused(tmp_path):
    stock_pipeline(diffusers.PNDMScheduler(20)).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="PNDMScheduler"):
        convert(ConvertConfig(source=str(tmp_path / "stock"), output_dir=str(tmp_path / "out")))


def test_command_ends_in_one_sentence(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    command = [sys.executable, "-m", "ddpm_pipe", "convert"]
    command += ["--source", tmp_path / "model.pt", "--output_dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ddpm-pipe convert: source=") and done.stderr.count("\n") == 1
