"""Pipelines are shared on the Hub and loaded by this package and by diffusers alone: same seed, same image.

The Hub is a server on this machine, its client the real one, and every loader a process of its own.
"""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from hub_server import HubServer

from ddpm_pipe import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DDPMUNet2DModel,
    noise,
    pipeline,
    prediction,
    schedulers,
)
from ddpm_pipe.portable import CODE, bundle

pytestmark = pytest.mark.xdist_group("hub")  # one worker: the processes are started once

HERE = Path(__file__).parent
SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
NETWORK, SAMPLER, PIPELINE = (f"unet/{CODE['unet']}.py", f"scheduler/{CODE['scheduler']}.py", f"{CODE['pipeline']}.py")


def ours(**options) -> DDPMUNet2DModel:
    torch.manual_seed(0)
    return DDPMUNet2DModel(**SMALL, attention_types="none", attention_head_dim=4, **options).eval()


def stock(**options) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(**SMALL, **blocks, **options).eval()


WITH_CLASSES = {"class_labels": [2, 0]}
# name -> network, scheduler, what is asked for, and the code files that have to travel
SHARED = {
    "all stock": (stock, {}, DDPMScheduler(), {}, set()),
    "a schedule of ours": (stock, {}, DDPMScheduler(beta_schedule="sigmoid_alpha_bar"), {}, set()),
    "zero terminal SNR": (
        stock,
        {},
        DDPMScheduler(rescale_betas_zero_snr=True, beta_schedule="cosine", prediction_type="v_prediction"),
        {},
        set(),
    ),
    "grey, short chain": (stock, {"in_channels": 1, "out_channels": 1}, DDPMScheduler(50), {}, set()),
    "learned variance": (stock, {"out_channels": 6}, DDPMScheduler(variance_type="learned_range"), {}, set()),
    "stock DDIM": (stock, {}, DDIMScheduler(clip_sample=False), {}, set()),
    "DDIM that clips": (stock, {}, DDIMScheduler(), {}, {PIPELINE}),
    "DDIM, trailing": (
        stock,
        {},
        DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
        {"num_inference_steps": 7},
        {SAMPLER},
    ),
    "DDPM, quadratic": (stock, {}, DDPMScheduler(timestep_spacing="quadratic"), {}, {SAMPLER}),
    "DDIM, learned variance": (
        stock,
        {"in_channels": 1, "out_channels": 2},
        DDIMScheduler(clip_sample=False),
        {},
        {PIPELINE},
    ),
    "classes, stock network": (stock, {"num_class_embeds": 4}, DDPMScheduler(), WITH_CLASSES, {PIPELINE}),
    "diffusers' Euler": (stock, {}, diffusers.EulerDiscreteScheduler(), {}, {PIPELINE}),
    "our network": (ours, {}, DDPMScheduler(prediction_type="sample"), {}, {NETWORK}),
    "our network, DDIM trailing": (
        ours,
        {},
        DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
        {"num_inference_steps": 7},
        {NETWORK, SAMPLER},
    ),
    "self-conditioned": (ours, {"self_condition": True}, DDPMScheduler(), {}, {NETWORK, PIPELINE}),
    "classes and guidance": (
        ours,
        {"num_class_embeds": 3, "self_condition": True},
        DDPMScheduler(),
        WITH_CLASSES | {"guidance_scale": 3.0},
        {NETWORK, PIPELINE},
    ),
    "all of it": (
        ours,
        {"num_class_embeds": 3, "self_condition": True, "out_channels": 6},
        DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing"),
        WITH_CLASSES,
        {NETWORK, SAMPLER, PIPELINE},
    ),
}
NEEDS_CODE = [name for name, row in SHARED.items() if row[-1]]
every = pytest.mark.parametrize("name", SHARED)


def repo_of(name: str) -> str:
    return "org/" + re.sub("[^a-zA-Z]+", "-", name)


def make(name: str) -> DDPMPipeline:
    network, options, scheduler, _, _ = SHARED[name]
    made = DDPMPipeline(network(**options), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def plain_python(tmp_path_factory) -> str:
    """The interpreter of a virtual environment that has all that this package needs, and not the package."""
    folder = tmp_path_factory.mktemp("plain") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(packages) / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")  # of an editable install nothing
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def hub():
    with HubServer(tokens={"hf_good": "org", "hf_other": "stranger"}) as server:
        yield server


@pytest.fixture(scope="module")
def push_environment(hub, tmp_path_factory):
    """The environment of a process that may push."""
    return os.environ | hub.environment(token="hf_good", home=tmp_path_factory.mktemp("pusher"))


@pytest.fixture(scope="module")
def shared(hub, push_environment, tmp_path_factory) -> dict[str, Path]:
    """The pipelines, pushed by `push_to_hub` of the loaded pipelines; their local folders."""
    folders = {}
    for name in SHARED:
        folders[name] = tmp_path_factory.mktemp("made") / "pipeline"
        make(name).save_pretrained(folders[name])
    code = """
import json, sys
from ddpm_pipe import DDPMPipeline
for folder, repo in json.loads(sys.argv[1]):
    DDPMPipeline.from_pretrained(folder).push_to_hub(repo, private=True)
"""
    run(code, push_environment, json.dumps([(str(folders[name]), repo_of(name)) for name in SHARED]))
    return folders


def run(code: str, environment: dict, *argv: str) -> None:
    """Run Python code in a new process that has this package."""
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def load(python: str, environment: dict, folder: Path, loader: str, pipelines: dict) -> dict:
    """What became of loading pipelines in a new process: per pipeline an error or the modules of its parts."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"loader": loader, "out": str(folder), "pipelines": pipelines}
    (folder / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules")}
    command = [python, str(HERE / "sample_pipelines.py"), str(folder / "job.json")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


def reader(hub, folder: Path, token: str = "hf_good") -> dict:
    return os.environ | hub.environment(token=token, home=folder / "home")


@pytest.fixture(scope="module")
def by_ddpm_pipe(hub, shared, tmp_path_factory) -> tuple[Path, dict]:
    """Loaded from the Hub where this package is installed; the folder of the images and the results."""
    folder = tmp_path_factory.mktemp("ours")
    before = len(hub.requests)
    jobs = {name: {"source": repo_of(name), "call": SHARED[name][3]} for name in SHARED}
    results = load(sys.executable, reader(hub, folder), folder / "out", "ddpm_pipe", jobs)
    return folder / "out", results | {"requests": [request.path for request in hub.requests[before:]]}


@pytest.fixture(scope="module")
def by_diffusers(hub, shared, plain_python, tmp_path_factory) -> tuple[Path, dict]:
    """Loaded from the Hub by diffusers alone, with trust where code has to travel."""
    folder = tmp_path_factory.mktemp("plain")
    jobs = {}
    for name, (*_, call, code) in SHARED.items():
        jobs[name] = {"source": repo_of(name), "call": call, "load": {"trust_remote_code": True} if code else {}}
    return folder / "out", load(plain_python, reader(hub, folder), folder / "out", "any", jobs)


def expected_images(name: str) -> np.ndarray:
    options = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"} | SHARED[name][3]
    return make(name)(generator=torch.Generator().manual_seed(0), **options).images


# ---------------------------------------------------------------- the loading table


@every
def test_what_is_pushed_is_json_safetensors_and_the_code_it_needs(hub, shared, name):
    files = {path for path in hub.files(repo_of(name)) if path not in (".gitattributes", "README.md")}
    plain = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert files == plain | {"unet/diffusion_pytorch_model.safetensors"} | SHARED[name][-1]
    assert hub.is_private(repo_of(name))


@every
def test_with_ddpm_pipe_the_hub_gives_the_same_images(by_ddpm_pipe, name):
    folder, results = by_ddpm_pipe
    assert isinstance(results[name], list), results[name]
    np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), expected_images(name))


def test_with_ddpm_pipe_no_code_is_downloaded_or_executed(by_ddpm_pipe):
    _, results = by_ddpm_pipe
    assert results["has_ddpm_pipe"] and not results["remote_code"]
    downloads = [path for path in results["requests"] if "/resolve/" in path]
    assert downloads and all(path.endswith((".json", ".safetensors")) for path in downloads)


@every
def test_diffusers_alone_gives_the_same_images(by_diffusers, name):
    folder, results = by_diffusers
    assert not results["has_ddpm_pipe"]
    assert isinstance(results[name], list), results[name]
    np.testing.assert_allclose(np.load(folder / f"{name}.npy"), expected_images(name), atol=1e-4)
    needed = {NETWORK: results[name][1], SAMPLER: results[name][2], PIPELINE: results[name][0]}
    assert {file for file, module in needed.items() if not module.startswith("diffusers.")} == SHARED[name][-1]


@pytest.mark.parametrize("loader", ["any", "stock"])
@pytest.mark.parametrize("with_package", [False, True], ids=["diffusers alone", "beside ddpm_pipe"])
def test_without_trust_code_is_refused(hub, shared, plain_python, tmp_path, loader, with_package):
    jobs = {name: {"source": repo_of(name)} for name in NEEDS_CODE}
    python = sys.executable if with_package else plain_python
    results = load(python, reader(hub, tmp_path), tmp_path / "out", loader, jobs)
    assert not results["remote_code"]
    for name in NEEDS_CODE:
        assert "trust_remote_code=True" in results[name], results[name]


def test_folders_on_disk_load_as_those_of_the_hub(shared, plain_python, tmp_path):
    jobs = {
        name: {"source": str(shared[name]), "call": SHARED[name][3], "load": {"trust_remote_code": True}}
        for name in SHARED
    }
    for loader, python in (("any", plain_python), ("ddpm_pipe", sys.executable)):
        folder = tmp_path / loader
        results = load(python, dict(os.environ), folder, loader, jobs)
        for name in SHARED:
            assert isinstance(results[name], list), results[name]
            np.testing.assert_allclose(np.load(folder / f"{name}.npy"), expected_images(name), atol=1e-4)
        assert bool(results["remote_code"]) is (loader == "any")


# ---------------------------------------------------------------- keywords of from_pretrained


def test_revision_token_cache_offline_variant_dtype_and_components_are_honoured(
    hub, shared, push_environment, tmp_path
):
    code = """
import sys, torch
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
)
from ddpm_pipe import DDIMScheduler, DDPMPipeline
folder, cache = sys.argv[1:]
repo = "org/keywords"
pipeline = DDPMPipeline.from_pretrained(folder)
first = pipeline.push_to_hub(repo, private=True)
sha = HfApi().model_info(repo).sha
with torch.no_grad():
    next(pipeline.unet.parameters()).zero_()
HfApi().create_branch(repo, branch="zeros")
pipeline.save_pretrained("/".join([cache, "zeros"]), variant="fp16")
HfApi().upload_folder(repo_id=repo, folder_path="/".join([cache, "zeros"]), revision="zeros")

def weight(**options):
    return next(DDPMPipeline.from_pretrained(repo, **options).unet.parameters())

def raises(kind, **options):
    try:
        weight(**options)
    except kind as error:
        return str(error)
    raise AssertionError(f"{options} raised nothing")

raises(LocalEntryNotFoundError, local_files_only=True)
assert weight().any() and weight(revision=sha).any()
assert weight(local_files_only=True).any()
assert not weight(revision="zeros", variant="fp16").any()
assert "fp16" in raises(ValueError, variant="fp16")
raises(RevisionNotFoundError, revision="nowhere")
nothing = "/".join([cache, "nothing"])
raises(RepositoryNotFoundError, token="hf_other", cache_dir=nothing)
assert "401" in raises(HfHubHTTPError, token="hf_bad", cache_dir=nothing)
raises(RepositoryNotFoundError, token=False, cache_dir=nothing)
assert weight(cache_dir=cache, torch_dtype=torch.bfloat16).dtype is torch.bfloat16
assert list(Path(cache).glob("models--org--keywords/snapshots/*/unet/*.safetensors"))
assert weight(device_map="cpu").any()
sampler = DDIMScheduler()
assert DDPMPipeline.from_pretrained(repo, scheduler=sampler).scheduler is sampler
empty = Path(cache) / "empty"
passed = DDPMPipeline.from_pretrained(repo, unet=pipeline.unet, cache_dir=empty)
assert passed.unet is pipeline.unet and not list(empty.rglob("*.safetensors"))
for options in ({"custom_pipeline": "x"}, {"use_safetensors": False}):
    assert "no pickles" in raises(ValueError, **options)
"""
    run(code, push_environment, str(shared["our network"]), str(tmp_path / "cache"))


def test_a_connection_dropped_in_the_middle_of_the_weights_is_resumed(hub, shared, tmp_path):
    hub.drop(after_bytes=20_000, times=2, path_contains="/lfs/")
    jobs = {"our network": {"source": repo_of("our network")}}
    results = load(sys.executable, reader(hub, tmp_path), tmp_path / "out", "ddpm_pipe", jobs)
    assert isinstance(results["our network"], list), results["our network"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "our network.npy"), expected_images("our network"))


def test_networks_and_schedulers_are_shared_by_themselves(hub, push_environment):
    code = """
import torch
from ddpm_pipe import DDIMScheduler, DDPMUNet2DModel
unet = DDPMUNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4)
unet.push_to_hub("org/network", private=True)
loaded = DDPMUNet2DModel.from_pretrained("org/network")
assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), loaded.parameters(), strict=True))
DDIMScheduler(beta_schedule="cosine", timestep_spacing="trailing").push_to_hub("org/sampler", private=True)
assert DDIMScheduler.from_pretrained("org/sampler").config.timestep_spacing == "trailing"
"""
    run(code, push_environment)
    assert "diffusion_pytorch_model.safetensors" in hub.files("org/network")


# ---------------------------------------------------------------- what is refused


def folder_with(tmp_path: Path, **changes) -> Path:
    make("our network").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vae": ["diffusers", "AutoencoderKL"], "_class_name": "LDMPipeline"}, r"LDMPipeline of scheduler, unet, vae"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, r"unet, which is a DDPMUNet2DModel or UNet2DModel"),
        ({"unet": ["evil", "Net"]}, r"unet, which is a DDPMUNet2DModel or UNet2DModel"),
        ({"scheduler": ["evil", "Sampler"]}, r"scheduler Sampler of evil"),
    ],
)
def test_pipelines_of_other_parts_are_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        DDPMPipeline.from_pretrained(folder_with(tmp_path, **changes))


def test_code_in_a_folder_is_not_executed(tmp_path):
    folder = folder_with(tmp_path, _class_name=["ddpm_pipeline", "PixelDiffusionPipeline"])
    for file in ("ddpm_pipeline.py", "pipeline.py", "unet/ddpm_unet.py"):
        (folder / file).write_text("raise RuntimeError('executed')\n")
    loaded = DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is DDPMPipeline and type(loaded.unet) is DDPMUNet2DModel
    (folder / "unet" / "ddpm_pipe.unet.py").write_text("raise RuntimeError('executed')\n")
    with pytest.raises(ValueError, match="custom code"):
        DDPMPipeline.from_pretrained(folder, trust_remote_code=True)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    folder = folder_with(tmp_path)
    weights = make("our network").unet.state_dict()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no unet/diffusion_pytorch_model.safetensors.*examples/convert.py"):
        DDPMPipeline.from_pretrained(folder)


def test_folders_of_before_load_still(tmp_path):
    """Their model_index.json names the modules of this package."""
    expected = make("our network")
    folder = folder_with(
        tmp_path, unet=["ddpm_pipe.unet", "DDPMUNet2DModel"], scheduler=["ddpm_pipe.schedulers", "DDPMScheduler"]
    )
    loaded = DDPMPipeline.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), expected.unet.parameters(), strict=True))
    assert type(loaded.scheduler) is DDPMScheduler


def test_code_of_an_earlier_save_does_not_stay(tmp_path):
    make("all of it").save_pretrained(tmp_path)
    make("all stock").save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.py"))


# ---------------------------------------------------------------- the code that travels


@pytest.mark.parametrize(
    "modules", [(noise, prediction, schedulers), (noise, prediction, pipeline)], ids=["schedulers", "pipeline"]
)
def test_modules_in_one_file_do_not_hide_each_others_names(modules: tuple[ModuleType, ...]):
    tree = ast.parse(bundle(*modules))
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    assert not [name for name, count in Counter(names).items() if count > 1]
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
        + ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
    }
    assert roots - sys.stdlib_module_names == {"torch", "diffusers"} | ({"numpy"} if schedulers in modules else set())
