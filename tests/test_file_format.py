"""Names that saved files carry, pinned, and the direction of imports inside the package.

Where a name changes on purpose, old files need a way to load first; then `python tests/test_file_format.py` records it.
"""

import ast
import inspect
import json
import sys
import tempfile
from graphlib import TopologicalSorter
from pathlib import Path

import diffusers
import pytest

import ddpm_pipe
from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel

GOLDEN = Path(__file__).parent / "golden" / "file_format.json"
CONFIGURABLE = (DDPMUNet2DModel, DDPMScheduler, DDIMScheduler)
EVERY_OPTION = {
    "sample_size": (8, 9),
    "out_channels": 6,
    "block_out_channels": (8, 12, 16),
    "norm_num_groups": 4,
    "attention_types": ("none", "linear", "full"),
    "num_attention_heads": (2, 2, 1),
    "attention_head_dim": 4,
    "num_mem_kv": 2,
    "downsample_type": "pixel_unshuffle",
    "time_embedding_type": "learned_fourier",
    "dropout": 0.1,
    "num_class_embeds": 3,
    "self_condition": True,
}

# ---------------------------------------------------------------- the file format


def network() -> DDPMUNet2DModel:
    return DDPMUNet2DModel(**EVERY_OPTION)


def model_index(unet, scheduler) -> dict:
    """What model_index.json says, but for the version of diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)
        index = json.loads((Path(folder) / "model_index.json").read_text())
    del index["_diffusers_version"]
    return index


def default_config(cls) -> dict:
    """The keys of a class' config and their defaults: a key that a file lacks takes its default."""
    keys = inspect.signature(cls.__init__).parameters.values()
    return {key.name: list(key.default) if isinstance(key.default, tuple) else key.default for key in list(keys)[1:]}


def file_format() -> dict:
    """All that is pinned, as JSON has it."""
    stock = diffusers.UNet2DModel(
        block_out_channels=(32,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    return {
        "model_index": {
            "ours": model_index(network(), DDPMScheduler()),
            "our network": model_index(network(), diffusers.DDPMScheduler()),
            "our scheduler": model_index(stock, DDIMScheduler(clip_sample=False)),
            "our scheduler, other than the stock one": model_index(
                stock, DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
            ),
            "stock": model_index(stock, diffusers.DDPMScheduler()),
        },
        "config": {cls.__name__: default_config(cls) for cls in CONFIGURABLE},
        "state_dict": {name: str(list(weight.shape)) for name, weight in sorted(network().state_dict().items())},
    }


@pytest.fixture(scope="module")
def current() -> dict:
    return file_format()


@pytest.mark.parametrize("part", ["model_index", "config", "state_dict"])
def test_names_in_saved_files_are_those_of_older_files(current, part):
    assert current[part] == json.loads(GOLDEN.read_text())[part]


@pytest.mark.parametrize("cls", CONFIGURABLE)
def test_saved_config_holds_every_argument_and_nothing_else(cls, tmp_path):
    made = network() if cls is DDPMUNet2DModel else cls()
    made.save_config(tmp_path)
    saved = json.loads((tmp_path / cls.config_name).read_text())
    assert saved["_class_name"] == cls.__name__
    assert {key for key in saved if not key.startswith("_")} - {"auto_map"} == set(default_config(cls))


@pytest.mark.parametrize("options", [{"time_embedding_type": "positional"}, {"num_class_embeds": None}], ids=str)
def test_state_dict_of_a_smaller_network_has_no_other_names(options):
    assert set(DDPMUNet2DModel(**{**EVERY_OPTION, **options}).state_dict()) < set(network().state_dict())


# ---------------------------------------------------------------- imports point one way

# module -> the modules of the package that it may import, in the order in which data flows
ALLOWED_IMPORTS = {
    # the algorithm
    "noise": set(),
    "prediction": {"noise"},
    "unet": set(),
    "weights": set(),
    "schedulers": {"noise", "prediction"},
    "likelihood": {"noise", "schedulers"},
    "objective": {"noise", "prediction", "schedulers", "likelihood"},
    "compatibility": {"noise", "prediction"},
    "pipeline": {"noise", "prediction", "compatibility"},
    "portable": {"compatibility", "noise", "prediction", "schedulers", "unet", "pipeline", "weights"},
    "foreign": {"unet", "weights"},
    "convert": {"foreign", "noise", "checkpoint", "config", "portable", "schedulers", "weights"},
    "editing": {"images", "noise", "prediction", "pipeline", "portable"},
    # what training stands on
    "randomness": set(),
    "sources": set(),
    "images": {"sources"},
    "data": {"checkpoint", "images", "randomness", "sources"},
    "stream": {"data", "images", "randomness", "sources"},
    "ema": set(),
    "timesteps": set(),
    "checkpoint": set(),
    "config": {"checkpoint"},
    "interruption": set(),
    # training
    "recipe": {"noise", "prediction", "portable", "schedulers", "objective", "config"}
    | {"randomness", "data", "stream", "ema", "timesteps"},
    "draws": {"randomness", "recipe"},
    "state": {"checkpoint", "ema", "timesteps", "pipeline", "recipe"},
    "log": {"checkpoint", "recipe"},
    "report": {"log"},
    "health": {"checkpoint", "data", "images", "log", "objective", "pipeline", "portable", "randomness", "recipe"}
    | {"schedulers", "state"},
    "card": {"config", "log", "portable", "recipe", "sampling"},
    "hub": {"card", "config", "portable"},
    # what is done with a trained model
    "sampling": {"checkpoint", "compatibility", "config", "noise", "pipeline", "portable"},
    "generate": {"checkpoint", "config", "noise", "portable", "sampling"},
    "features": {"checkpoint", "sampling"},
    "metrics": {"features"},
    "memorisation": {"data"},
    "evaluate": {
        "card",
        "checkpoint",
        "config",
        "data",
        "features",
        "images",
        "likelihood",
        "memorisation",
        "metrics",
        "pipeline",
    }
    | {"prediction", "randomness", "recipe", "sampling", "schedulers"},
    "posthoc": {"checkpoint", "config", "ema", "portable"},
}
ALLOWED_IMPORTS["train"] = set(ALLOWED_IMPORTS)
ALLOWED_IMPORTS["__init__"] = set(ALLOWED_IMPORTS)

SOURCES = {path.stem: path.read_text() for path in sorted(Path(ddpm_pipe.__file__).parent.glob("*.py"))}


def imported(source: str) -> set[str]:
    """Dotted names of all that a module's source imports, wherever in it, relative ones spelled out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, ["ddpm_pipe" if node.level else None, node.module]))
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source imports; a name that is no module is of `__init__`."""
    inside = [name.split(".") for name in imported(source) if name.split(".")[0] == "ddpm_pipe"]
    modules = {*SOURCES, *ALLOWED_IMPORTS}
    return {name[1] if len(name) > 1 and name[1] in modules else "__init__" for name in inside}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import torch, ddpm_pipe.noise", {"noise"}),
        ("from ddpm_pipe.noise import make_betas", {"noise"}),
        ("from ddpm_pipe import noise as n", {"noise"}),
        ("def late():\n    from .noise import make_betas", {"noise"}),
        ("from . import noise, unet", {"noise", "unet"}),
        ("from ddpm_pipe import DDPMPipeline", {"__init__"}),
        ("import ddpm_pipe", {"__init__"}),
        ("from ddpm_pipes.noise import make_betas", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imported_modules(source) == expected


def test_every_module_has_its_row():
    assert set(SOURCES) <= set(ALLOWED_IMPORTS)


@pytest.mark.parametrize("module", SOURCES)
def test_module_imports_only_what_its_row_allows(module):
    assert imported_modules(SOURCES[module]) <= ALLOWED_IMPORTS[module]


@pytest.mark.parametrize("kind", ["allowed", "actual"])
def test_imports_have_no_cycle(kind):
    actual = {module: imported_modules(source) for module, source in SOURCES.items()}
    TopologicalSorter(ALLOWED_IMPORTS if kind == "allowed" else actual).prepare()  # raises CycleError


def test_network_file_needs_only_torch_and_diffusers():
    """It is copied into shared checkpoints and runs where this package is not installed."""
    roots = {name.split(".")[0] for name in imported(SOURCES["unet"])}
    assert roots - sys.stdlib_module_names == {"torch", "diffusers"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(file_format(), indent=1) + "\n")
