"""Pipelines are shared on the Hub and loaded by this package and by diffusers alone: same seed, same image.

The Hub is a server on this machine, its client the real one, and every loader a process of its own.
"""

import ast
import json
import math
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from hub_server import HubServer
from pypi import unpacked
from safetensors.torch import load_file, save_file

from ddpm_pipe import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DDPMUNet2DModel,
    compatibility,
    noise,
    pipeline,
    prediction,
    schedulers,
)
from ddpm_pipe.editing import InpaintPipeline
from ddpm_pipe.pretrained import CODE, bundle

pytestmark = pytest.mark.xdist_group("hub")  # one worker: the processes are started once

HERE = Path(__file__).parent
SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
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
    "LCM, after consistency tuning": (
        stock,
        {},
        diffusers.LCMScheduler.from_config(
            DDPMScheduler(beta_schedule="cosine", prediction_type="v_prediction").config, original_inference_steps=1000
        ),
        {"num_inference_steps": 2},
        set(),
    ),
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
    assert {"diffusion_pytorch_model.safetensors", "config.json", f"{CODE['unet']}.py"} < set(hub.files("org/network"))


@pytest.mark.parametrize("source", ["a repository", "a folder", "the folder of a pipeline's network"])
def test_diffusers_alone_loads_a_network_of_ours_with_trust(hub, push_environment, plain_python, tmp_path, source):
    network = ours(time_embedding_type="learned_fourier", time_fourier_dim=6)
    network.save_pretrained(tmp_path / "network")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    places = {"a folder": tmp_path / "network", "the folder of a pipeline's network": tmp_path / "pipeline" / "unet"}
    if source == "a repository":
        code = "import sys, ddpm_pipe\nddpm_pipe.DDPMUNet2DModel.from_pretrained(sys.argv[1]).push_to_hub('org/alone')"
        run(code, push_environment, str(tmp_path / "network"))
    code = f"""
import sys, torch
from diffusers import AutoModel
network = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(network(torch.ones(1, 3, 8, 8), 7).sample, {str(tmp_path / "output.pt")!r})
try:
    AutoModel.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code ran without trust")
"""
    environment = reader(hub, tmp_path) | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [plain_python, "-c", code, str(places.get(source, "org/alone"))]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr
    expected = network(torch.ones(1, 3, 8, 8), 7).sample
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected)


# ---------------------------------------------------------------- what is refused


def folder_with(tmp_path: Path, **changes) -> Path:
    make("our network").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    return tmp_path


def sentence(folder: Path, pipeline_class=DDPMPipeline, **options) -> str:
    """The one sentence in which loading a folder ends."""
    with pytest.raises(ValueError) as error:
        pipeline_class.from_pretrained(folder, **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vae": ["diffusers", "AutoencoderKL"], "_class_name": "LDMPipeline"}, r"LDMPipeline of scheduler, unet, vae"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, r"unet, which is a DDPMUNet2DModel or UNet2DModel"),
        ({"unet": ["evil", "Net"]}, r"unet, which is a DDPMUNet2DModel or UNet2DModel"),
        ({"scheduler": ["evil", "Sampler"]}, r"scheduler Sampler of evil"),
        ({"scheduler": ["evil", "DDPMScheduler"]}, r"scheduler DDPMScheduler of evil"),
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, r"scheduler NoSuchScheduler of diffusers"),
        ({"scheduler": ["diffusers", "SchedulerMixin"]}, r"scheduler SchedulerMixin of diffusers"),
        ({"scheduler": "DDPMScheduler"}, r"library and the class of its scheduler, not 'DDPMScheduler'"),
        ({"scheduler": [None, None]}, r"library and the class of its scheduler"),
        ({"unet": ["diffusers", ["UNet2DModel"]]}, r"library and the class of its unet"),
        ({"unet": {}}, r"library and the class of its unet"),
        ({"_class_name": ["evil", "Pipeline"]}, r"_class_name \['evil', 'Pipeline'\]"),
        ({"_class_name": 3}, r"_class_name 3"),
    ],
    ids=str,
)
def test_pipelines_of_other_parts_are_refused(tmp_path, changes, told):
    assert re.search(told, sentence(folder_with(tmp_path, **changes)))


def evil(tmp_path: Path, file: str) -> Path:
    """A code file of a folder under `tmp_path` that would leave a mark; the mark."""
    mark = tmp_path / "executed"
    (tmp_path / "folder" / file).write_text(f"""
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
open({str(mark)!r}, "w").close()
class Pipeline(DiffusionPipeline): ...
class Sampler(SchedulerMixin, ConfigMixin): ...
class DDPMUNet2DModel(ModelMixin, ConfigMixin): ...
""")
    return mark


# what model_index.json says, and a JSON file beside a code file that a loader of diffusers would run for it
MALICIOUS = {
    "a pipeline in the place of the scheduler": (
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        ("scheduler/model_index.json", {"_class_name": ["evil", "Pipeline"]}),
        "scheduler/evil.py",
    ),
    "a pipeline in the place of the unet": (
        {"unet": ["diffusers", "DiffusionPipeline"]},
        ("unet/model_index.json", {"_class_name": ["evil", "Pipeline"]}),
        "unet/evil.py",
    ),
    "a model of any class in the place of the scheduler": (
        {"scheduler": ["diffusers", "AutoModel"]},
        ("scheduler/config.json", {"_class_name": "X", "auto_map": {"AutoModel": "evil.DDPMUNet2DModel"}}),
        "scheduler/evil.py",
    ),
    "a scheduler of its own": ({"scheduler": ["evil", "Sampler"]}, None, "scheduler/evil.py"),
    "a scheduler of a known name": ({"scheduler": ["evil", "DDPMScheduler"]}, None, "scheduler/evil.py"),
    "a network of a known name": ({"unet": ["evil", "DDPMUNet2DModel"]}, None, "unet/evil.py"),
    "a pipeline of its own": ({"_class_name": ["evil", "Pipeline"]}, None, "evil.py"),
    "a class name that is a list in the network's config": (
        {},
        ("unet/config.json", {"_class_name": ["evil", "DDPMUNet2DModel"]}),
        "unet/evil.py",
    ),
    "a class name that is a list in the scheduler's config": (
        {},
        ("scheduler/scheduler_config.json", {"_class_name": ["evil", "Sampler"]}),
        "scheduler/evil.py",
    ),
}


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, InpaintPipeline])
@pytest.mark.parametrize("trick", MALICIOUS)
def test_folder_that_would_run_code_is_refused_and_does_not(tmp_path, trick, pipeline_class):
    changes, config, code = MALICIOUS[trick]
    folder = folder_with(tmp_path / "folder", **changes)
    if config is not None:
        (folder / config[0]).write_text(json.dumps(config[1]))
    mark = evil(tmp_path, code)
    sentence(folder, pipeline_class, trust_remote_code=True)
    assert not mark.exists()


def test_code_in_a_folder_is_not_executed(tmp_path):
    folder = folder_with(tmp_path / "folder", _class_name=["ddpm_pipeline", "PixelDiffusionPipeline"])
    for file in ("ddpm_pipeline.py", "pipeline.py", "unet/ddpm_unet.py", "unet/ddpm_pipe.unet.py"):
        mark = evil(tmp_path, file)
    loaded = DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is DDPMPipeline and type(loaded.unet) is DDPMUNet2DModel
    assert not mark.exists()


def test_lowest_version_of_diffusers_that_is_allowed_runs_no_code_either(repo, request):
    requirements = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["dependencies"]
    (lowest,) = (entry.removeprefix("diffusers>=") for entry in requirements if entry.startswith("diffusers>="))
    folder = unpacked("diffusers", lowest, request.config.cache.mkdir("packages"))
    code = f"""
import sys, diffusers, pytest
assert diffusers.__version__ == "{lowest}", diffusers.__version__
sys.exit(pytest.main(["-n0", "-p", "no:cacheprovider", {__file__!r}, "-k", "(refused or not_executed) and not trust"]))
"""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{repo}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------- damaged and other files


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\xff", "[" * 100_000], ids=lambda text: text[:3])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_file_that_holds_no_json_object_is_refused_by_name(tmp_path, file, text):
    folder = folder_with(tmp_path)
    (folder / file).write_bytes(text.encode("latin-1"))
    assert str(folder / file) in sentence(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"layers_per_block": -1}),
        ("unet/config.json", {"num_mem_kv": {}}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"trained_betas": ["x"]}),
        ("scheduler/scheduler_config.json", {"variance_type": 3}),
    ],
    ids=str,
)
def test_config_that_makes_nothing_is_refused_by_name(tmp_path, file, changes):
    folder = folder_with(tmp_path)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))
    assert str(folder / file) in sentence(folder)


@pytest.mark.parametrize("missing", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_config_that_is_missing_is_refused_by_name(tmp_path, missing):
    folder = folder_with(tmp_path)
    (folder / missing).unlink()
    assert str(folder / missing) in sentence(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n", "half"], ids=lambda c: str(c[:4])
)
def test_weights_that_are_damaged_are_refused_by_name(tmp_path, content):
    file = folder_with(tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content)
    assert f"{file} is no safetensors file" in sentence(tmp_path)


def change(folder: Path, **tensors) -> None:
    """Change the saved weights of a folder; None takes one away."""
    weights = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"conv_in.bias": None, "conv_out.bias": None}, "lacks the weights 'conv_in.bias', 'conv_out.bias' of"),
        ({"surprise": torch.zeros(1)}, "a part that DDPMUNet2DModel cannot express, 'surprise'"),
        ({"conv_in.bias": torch.zeros(3)}, r"'conv_in.bias' of .* is \(3,\) where"),
        ({"conv_in.bias": torch.tensor([0.0] * 7 + [math.nan])}, "'conv_in.bias' of .* NaN or infinite"),
        ({"conv_in.bias": torch.tensor([0.0] * 7 + [-math.inf])}, "'conv_in.bias' of .* NaN or infinite"),
        ({"conv_in.bias": torch.zeros(8, dtype=torch.int8)}, "'conv_in.bias' of .* torch.int8"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_weights_that_do_not_fit_the_network_are_refused_by_name(tmp_path, tensors, told):
    folder = folder_with(tmp_path)
    change(folder, **tensors)
    assert re.search(told, sentence(folder))


def test_weights_too_large_for_the_precision_are_refused(tmp_path):
    folder = folder_with(tmp_path)
    change(folder, **{"conv_in.bias": torch.full((8,), 1e5)})
    assert DDPMPipeline.from_pretrained(folder).unet.dtype is torch.float32
    assert "torch.float16" in sentence(folder, torch_dtype=torch.float16)


@pytest.mark.parametrize("alone", [False, True], ids=["pipeline", "network alone"])
def test_missing_weights_are_never_drawn_at_random(tmp_path, alone):
    folder = folder_with(tmp_path)
    change(folder, **{"conv_in.bias": None})
    with pytest.raises(ValueError, match=r"lacks the weights.*conv_in\.bias"):
        DDPMUNet2DModel.from_pretrained(folder / "unet") if alone else DDPMPipeline.from_pretrained(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_put_together(tmp_path, variant):
    expected = make("our network")
    expected.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = DDPMPipeline.from_pretrained(tmp_path, variant=variant)
    for mine, theirs in zip(loaded.unet.parameters(), expected.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "{folder}/outside.safetensors", "none.safetensors", 3, None]
)
def test_shards_outside_the_folder_are_refused(tmp_path, place):
    make("our network").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    outside = place.format(folder=tmp_path) if isinstance(place, str) else place
    name = next(iter(content["weight_map"]))
    (tmp_path / "unet" / content["weight_map"][name]).rename(tmp_path / "outside.safetensors")
    shards = content["weight_map"].items()
    content["weight_map"] = {key: outside if shard == content["weight_map"][name] else shard for key, shard in shards}
    index.write_text(json.dumps(content))
    assert f"{index} names {outside!r}" in sentence(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}], ids=str)
def test_index_without_shards_is_refused(tmp_path, content):
    folder = folder_with(tmp_path)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps(content))
    assert str(index) in sentence(folder)


def test_links_are_followed_as_the_cache_of_the_hub_has_them(tmp_path):
    folder = folder_with(tmp_path / "folder")
    (folder / WEIGHTS).rename(tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline


# ---------------------------------------------------------------- folders that hold no such weights


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    folder = folder_with(tmp_path)
    weights = make("our network").unet.state_dict()
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "unet" / "diffusion_pytorch_model.bin")
    assert re.search(r"no unet/diffusion_pytorch_model.safetensors.*ddpm-pipe convert", sentence(folder))


def test_pickles_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        make("our network").save_pretrained(tmp_path / "folder", safe_serialization=False)
    assert not (tmp_path / "folder").exists()


def test_weights_that_are_missing_are_not_called_pickled(tmp_path):
    folder = folder_with(tmp_path)
    (folder / WEIGHTS).unlink()
    told = sentence(folder)
    assert "has no weights: unet/diffusion_pytorch_model.safetensors is missing" in told and "pickle" not in told


def test_variant_that_is_missing_is_told_with_those_there(tmp_path):
    make("our network").save_pretrained(tmp_path, variant="half")
    make("our network").save_pretrained(tmp_path, variant="quarter", max_shard_size="20KB")
    told = sentence(tmp_path, variant="fp16")
    assert "no weights of variant='fp16', only those of variant='half' and of variant='quarter'" in told
    assert "no weights without variant, only those of variant='half'" in sentence(tmp_path)


def test_folder_around_or_inside_a_pipeline_names_it(tmp_path):
    folder_with(tmp_path / "run" / "pipeline")
    folder_with(tmp_path / "run" / "ema-0.05")
    run, pipeline = tmp_path / "run", tmp_path / "run" / "pipeline"
    assert sentence(run).endswith(f"holds {run / 'ema-0.05'}, {pipeline}; give one of these.")
    assert f"a part of the pipeline {pipeline};" in sentence(pipeline / "unet")
    (tmp_path / "empty").mkdir()
    assert "holds no pipeline: model_index.json is missing" in sentence(tmp_path / "empty")


def test_folder_of_any_name_loads(tmp_path):
    folder = folder_with(tmp_path / "dir [a]*b {c}?")
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"low_memory": True}, "does not know the keyword 'low_memory'; it knows unet"),
        ({"device_map": "nowhere"}, "device_map='nowhere'"),
        ({"torch_dtype": "float16"}, "torch_dtype='float16'"),
    ],
)
def test_keyword_that_cannot_be_honoured_is_refused(tmp_path, options, told):
    assert told in sentence(folder_with(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": {"unet": torch.bfloat16}}, torch.bfloat16),
        ({"torch_dtype": {"default": torch.bfloat16}}, torch.bfloat16),
        ({"device_map": "balanced"}, torch.float32),
    ],
    ids=str,
)
def test_precision_is_that_asked_for(tmp_path, options, dtype):
    assert DDPMPipeline.from_pretrained(folder_with(tmp_path), **options).unet.dtype is dtype


@pytest.mark.parametrize("source", ["no/such/folder", "model_index.json/x/y"])
def test_path_that_is_not_there_is_refused(source):
    assert f"'{source}' is neither a folder here nor the id of a repository" in sentence(Path(source))


def test_folder_does_not_tell_where_it_was_loaded_from(tmp_path):
    folder = folder_with(tmp_path / "folder")
    DDPMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    DDPMUNet2DModel.from_pretrained(folder / "unet").save_pretrained(tmp_path / "again" / "alone")
    assert not [file for file in (tmp_path / "again").rglob("*.json") if str(tmp_path) in file.read_text()]


@pytest.mark.parametrize("home", ["ddpm_pipe.", "diffusers_modules.local.ddpm_"])
def test_folders_of_before_and_those_that_diffusers_saved_again_load_still(tmp_path, home):
    """Their model_index.json names the modules of this package, or the code that travelled."""
    expected = make("our network")
    folder = folder_with(
        tmp_path,
        unet=[f"{home}unet", "DDPMUNet2DModel"],
        scheduler=[f"{home}schedulers", "DDPMScheduler"],
        _class_name="PixelDiffusionPipeline",
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
    "modules",
    [(noise, prediction, schedulers), (noise, prediction, compatibility, pipeline)],
    ids=["schedulers", "pipeline"],
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
