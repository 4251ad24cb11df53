"""The pipeline as it is saved and loaded, by this package and by diffusers without it.

What diffusers has classes for is saved as theirs; otherwise the modules of this package travel with the weights, as
code that diffusers runs only with `trust_remote_code=True` and this package never. A pipeline that the stock one would
sample wrongly names its own, so that it cannot be mistaken for it.
"""

import ast
import json
from os import PathLike
from pathlib import Path
from types import ModuleType

from diffusers import ModelMixin, SchedulerMixin, UNet2DModel
from huggingface_hub import snapshot_download

from ddpm_pipe import noise, pipeline, prediction, schedulers, unet
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler
from ddpm_pipe.unet import DDPMUNet2DModel

NETWORKS: dict[str, type[ModelMixin]] = {cls.__name__: cls for cls in (DDPMUNet2DModel, UNet2DModel)}
SAMPLERS = {cls.__name__: cls for cls in (DDPMScheduler, DDIMScheduler)}

CODE = {"unet": "ddpm_unet", "scheduler": "ddpm_schedulers", "pipeline": "ddpm_pipeline"}
"""Names of the code files, without suffix. diffusers looks for `<component>/<name>.py`, of the pipeline at the root."""

FAITHFUL: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {
        "timestep_spacing": ("leading", "linspace"),
        "steps_offset": (0,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    },
    "DDIMScheduler": {"timestep_spacing": ("leading",), "steps_offset": (0,)},
}
"""Config values with which diffusers' scheduler of that name draws the same images as ours, for any count of steps."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class DDPMPipeline(PixelDiffusionPipeline):
    """Generation in pixel space, saved so that diffusers alone can load it too.

    Args:
        unet: a `DDPMUNet2DModel` or a `diffusers.UNet2DModel`.
        scheduler: of this package or of diffusers; what the network predicts is its `prediction_type`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **kwargs) -> "DDPMPipeline":
        """Load a pipeline from a folder or the Hub, its own or a stock one of a UNet2DModel and a scheduler.

        DDPM and DDIM schedulers load as those of this package. No code of the folder or repository is executed.

        Args:
            pretrained_model_name_or_path: a folder or the id of a repository.
            kwargs: as for `diffusers.DiffusionPipeline.from_pretrained`: revision, token, cache_dir, local_files_only,
                force_download, variant, torch_dtype, device_map, and components to use instead of the saved ones.

        Raises:
            ValueError: for a pipeline of other parts, weights that are not safetensors, or a custom pipeline.
            OSError: where the repository, revision or file is not there or may not be read.
        """
        if kwargs.pop("custom_pipeline", None) is not None or kwargs.pop("use_safetensors", True) is False:
            raise ValueError(
                "DDPMPipeline runs no code of a repository and loads no pickles, so it takes neither custom_pipeline "
                "nor use_safetensors=False; use diffusers.DiffusionPipeline where you trust the source."
            )
        kwargs.pop("trust_remote_code", None)  # there is nothing to trust
        if Path(pretrained_model_name_or_path).is_dir():
            _check_weights(pretrained_model_name_or_path, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, use_safetensors=True, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """The folder of the cache with the configs and safetensors of a repository, and nothing else of it.

        Args:
            pretrained_model_name: the id of a repository.
            kwargs: `HUB_OPTIONS`, variant, and components whose weights are not needed.

        Raises:
            ValueError: where the repository has no such weights.
        """
        patterns = [cls.config_name, "*/*.json"]
        if kwargs.get("unet") is None:
            patterns += [f"unet/{name}" for name in _weight_files(kwargs.get("variant"))]
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        folder = snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)
        _check_weights(folder, **kwargs)
        return folder

    @classmethod
    def load_config(cls, *args, **kwargs):
        """What model_index.json says, with the classes of this package in the place of code and of stock schedulers."""
        loaded = super().load_config(*args, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        parts = {name for name in index if not name.startswith("_")}
        if parts != {"unet", "scheduler"} or index["unet"][1] not in NETWORKS:
            raise ValueError(
                f"{args[0]} holds a {index['_class_name']} of {', '.join(sorted(parts))}; DDPMPipeline is made of a "
                f"scheduler and a unet, which is a {' or '.join(NETWORKS)}."
            )
        library, name = index["scheduler"]
        if name not in SAMPLERS and library != "diffusers":
            raise ValueError(
                f"{args[0]} has a scheduler {name} of {library}; schedulers are those of diffusers and of this package."
            )
        known: dict[str, type] = {**NETWORKS, **SAMPLERS}
        for part in parts:
            _, name = index[part]
            if name in known:
                module = known[name].__module__
                index[part] = ["diffusers" if module.startswith("diffusers.") else module, name]
        index["_class_name"] = cls.__name__
        return loaded

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and the code that diffusers needs beside it, the last part of `save_pretrained`."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        sources: dict[str, list[ModuleType]] = {}
        if isinstance(self.unet, DDPMUNet2DModel):
            index["unet"][0], sources["unet"] = CODE["unet"], [unet]
        if isinstance(self.scheduler, tuple(SAMPLERS.values())):
            if is_faithful(self.scheduler):
                index["scheduler"][0] = "diffusers"
            else:
                index["scheduler"][0] = CODE["scheduler"]
                sources["scheduler"] = [noise, prediction, schedulers]
        if not stock_pipeline_samples(self.unet, self.scheduler):
            index["_class_name"] = [CODE["pipeline"], PixelDiffusionPipeline.__name__]
            sources["pipeline"] = [noise, prediction, pipeline]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
        for part, name in CODE.items():
            file = (folder if part == "pipeline" else folder / part) / f"{name}.py"
            if part in sources:
                file.write_text(bundle(*sources[part]))
            else:
                file.unlink(missing_ok=True)  # of what was saved here before


def is_faithful(scheduler: SchedulerMixin) -> bool:
    """Whether diffusers' scheduler of the same name and config draws the same images."""
    values = FAITHFUL[type(scheduler).__name__]
    return all(scheduler.config[key] in accepted for key, accepted in values.items())


def stock_pipeline_samples(unet: ModelMixin, scheduler: SchedulerMixin) -> bool:
    """Whether diffusers' DDPMPipeline, which knows x_t and t alone, draws what this network was trained for."""
    name, config = type(scheduler).__name__, unet.config
    needs_more = config.get("num_class_embeds") is not None or config.get("self_condition")
    learned_variance = config.out_channels != config.in_channels
    # of a clipped x0 ours derives the noise of DDIM anew, and the stock pipeline does not
    clips = scheduler.config.get("clip_sample") or scheduler.config.get("thresholding")
    is_simple = name == "DDPMScheduler" or (name == "DDIMScheduler" and not learned_variance and not clips)
    return is_simple and not needs_more


def bundle(*modules: ModuleType) -> str:
    """The source of modules of this package as one file, the later ones after those they import: diffusers fetches
    one file and not what it imports beside it."""
    texts = []
    for module in modules:
        text = Path(str(module.__file__)).read_text()
        inside = [
            n for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and (n.module or "")[:9] == "ddpm_pipe"
        ]
        dropped = {line for node in inside for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        texts.append("\n".join(line for i, line in enumerate(text.splitlines(), 1) if i not in dropped))
    return "\n\n".join(texts) + "\n"


def _weight_files(variant: str | None) -> list[str]:
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    return [f"{stem}.safetensors", f"{stem}-*.safetensors"]


def _check_weights(folder: str | PathLike, unet: ModelMixin | None = None, variant: str | None = None, **_) -> None:
    names = _weight_files(variant)
    if unet is None and not any(file for name in names for file in (Path(folder) / "unet").glob(name)):
        raise ValueError(
            f"{folder} has no unet/{names[0]} (variant={variant!r}); pickled weights can run code and are not loaded: "
            "examples/convert.py makes safetensors of them."
        )
