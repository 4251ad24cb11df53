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

METHOD = ["checks", "noise", "prediction", "schedulers", "likelihood", "objective", "consistency", "unet"]
METHOD += ["compatibility", "pipeline"]
"""The method, in its order: each module imports only from those before it."""

ROOMS: dict[str, set[str]] = {
    "method": set(),
    "randomness": set(),
    "config": set(),
    "launch": set(),
    "run": {"config"},
    "weights": {"method", "run"},
    "data": {"launch", "randomness", "run"},
    "samplers": {"method", "config", "run", "weights"},
    "sharing": {"config", "run", "weights", "samplers"},
    "pretrained": {"method", "weights", "samplers", "sharing"},
    "editing": {"method", "data", "pretrained"},
    "sampling": {"method", "config", "launch", "run", "weights", "samplers", "pretrained", "sharing"},
    "training": {"method", "config", "launch", "randomness", "run", "data", "weights", "pretrained", "sharing"},
    "evaluation": {"method", "config", "randomness", "launch", "run", "data", "weights", "pretrained", "sampling"}
    | {"samplers", "sharing"},
    "demo": {"method", "config", "launch", "data", "samplers", "pretrained", "editing", "sampling", "sharing"},
    "convert": {"method", "config", "run", "weights", "samplers", "pretrained"},
    "export": {"method", "config", "run", "weights", "samplers", "pretrained", "sampling", "sharing"},
    "cli": {"config", "__init__"},
}
"""Room or module -> where it may import from, besides itself. The command line loads what it runs by name."""

OUTSIDE = {"__init__": {"pretrained", "method"}, "__main__": {"cli"}}

PACKAGE = Path(ddpm_pipe.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """Where a module belongs: the longest row of the table that its name begins with."""
    if module in METHOD:
        return "method"
    return max((row for row in ROOMS if f"{module}.".startswith(f"{row}.")), key=len, default=module)


def imported(source: str) -> set[str]:
    """Dotted names of all that a module's source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(source: str) -> set[str]:
    """Modules of the package that a source imports; a name of no module is of `__init__`."""
    inside = [
        name.removeprefix("ddpm_pipe").strip(".") for name in imported(source) if name.split(".")[0] == "ddpm_pipe"
    ]
    known = [module for module in SOURCES if not module.endswith("__init__")]
    return {max((m for m in known if f"{name}.".startswith(f"{m}.")), key=len, default="__init__") for name in inside}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import torch, ddpm_pipe.noise", {"noise"}),
        ("from ddpm_pipe.noise import make_betas", {"noise"}),
        ("from ddpm_pipe import noise as n", {"noise"}),
        ("def late():\n    from ddpm_pipe.run.files import sha256", {"run.files"}),
        ("from ddpm_pipe.run import files", {"run.files"}),
        ("from ddpm_pipe import DDPMPipeline", {"__init__"}),
        ("import ddpm_pipe", {"__init__"}),
        ("from ddpm_pipes.noise import make_betas", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert imported_modules(source) == expected


@pytest.mark.parametrize("module", SOURCES)
def test_module_imports_only_what_its_room_may(module):
    allowed = (ROOMS | OUTSIDE)[room(module)] | {room(module)}
    assert {room(name) for name in imported_modules(SOURCES[module])} <= allowed


@pytest.mark.parametrize("module", METHOD)
def test_the_method_reads_from_top_to_bottom(module):
    assert imported_modules(SOURCES[module]) <= set(METHOD[: METHOD.index(module)])


def test_imports_have_no_cycle():
    TopologicalSorter({module: imported_modules(source) for module, source in SOURCES.items()}).prepare()


def test_rooms_have_no_cycle():
    TopologicalSorter(ROOMS).prepare()


def test_network_file_needs_only_torch_and_diffusers():
    """It is copied into shared checkpoints and runs where this package is not installed."""
    roots = {name.split(".")[0] for name in imported(SOURCES["unet"])}
    assert roots - sys.stdlib_module_names == {"torch", "diffusers"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(file_format(), indent=1) + "\n")
