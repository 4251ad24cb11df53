"""The pipeline in a form that this package saves and loads, and that diffusers loads without this package.

Parts for which diffusers has classes are saved as these. Otherwise the modules of this package travel with the weights
as code, which diffusers runs only with `trust_remote_code=True` and this package never runs. A pipeline that the stock
one would sample wrongly is saved under a class name of its own, so that the two cannot be confused.
"""

import ast
import json
import tempfile
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import get_device
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError

from ddpm_pipe import checks, compatibility, noise, pipeline, prediction, schedulers, unet
from ddpm_pipe.pipeline import PixelDiffusionPipeline
from ddpm_pipe.samplers import OWN_SCHEDULERS, Samplers, read_samplers, scheduler_class
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.card import make_card
from ddpm_pipe.sharing.upload import stage_pipeline, upload
from ddpm_pipe.unet import DDPMUNet2DModel
from ddpm_pipe.weights import (
    CODE,
    SAMPLERS_FILE,
    STEM,
    from_config,
    load_network,
    part_folder,
    read_json,
    weight_files,
    why_none,
)

NETWORKS: dict[str, type[ModelMixin]] = {cls.__name__: cls for cls in (DDPMUNet2DModel, UNet2DModel)}

LIBRARIES = {"diffusers", DDPMUNet2DModel.__module__, DDPMScheduler.__module__} | {
    f"{prefix}{name}" for name in CODE.values() for prefix in ("", "diffusers_modules.local.")
}
"""Where model_index.json may say that a class of this package or of diffusers is. diffusers writes names of the last
kind where it loaded such a pipeline and saved it again."""

FAITHFUL: dict[str, dict[str, tuple]] = {
    "DDPMScheduler": {
        "timestep_spacing": ("leading", "linspace"),
        "steps_offset": (0,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    },
    "DDIMScheduler": {"timestep_spacing": ("leading",), "steps_offset": (0,)},
}
"""Config values with which the diffusers scheduler of that name draws the same images as ours, for any step count."""

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class DDPMPipeline(PixelDiffusionPipeline):
    """Generate images in pixel space, and save the pipeline so that diffusers alone can load it too.

    Args:
        unet: a `DDPMUNet2DModel` or a `diffusers.UNet2DModel`.
        scheduler: of this package or of diffusers; its `prediction_type` says what the network predicts.

    Attributes:
        samplers: the samplers that were found for these weights, or None. Where there are timesteps for the scheduler,
            the number of steps and the conditions of a call, the call takes them; set it to None and it does not.
    """

    samplers: Samplers | None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *,
        unet: ModelMixin | None = None,
        scheduler: SchedulerMixin | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        device_map: str | torch.device | None = None,
        use_safetensors: bool | None = True,
        custom_pipeline: str | None = None,
        trust_remote_code: bool = False,
        **hub_options,
    ) -> "DDPMPipeline":
        """Load a pipeline from a folder or the Hub: one of this package or a stock one of UNet2DModel and scheduler.

        Both parts may also lie in the folder itself, as those of google/ddpm-* do.

        DDPM and DDIM schedulers load as those of this package. No code of the folder or repository is executed: this
        method makes both parts itself, from classes of this package and of diffusers.

        Args:
            pretrained_model_name_or_path: a folder or the id of a repository.
            unet, scheduler: a part to use instead of the saved one.
            variant: which of several saved sets of weights to load, such as "fp16".
            torch_dtype, dtype: two names for the precision of the network, float32 by default; may be a dict such as
                `{"unet": torch.float16}`.
            device_map: the device of the network, or "balanced" for the accelerator where there is one.
            use_safetensors, custom_pipeline, trust_remote_code: keywords of diffusers' pipelines. This method loads no
                pickles and no code: it refuses the first two where they ask for that, and ignores the third.
            hub_options: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            ValueError: for a pipeline of other parts, weights that are not safetensors, do not fit the network or are
                not finite, a damaged file, or an unknown keyword, naming it.
            OSError: where the repository, revision or file does not exist or may not be read.
        """
        if custom_pipeline is not None or use_safetensors is False:
            raise ValueError(
                "DDPMPipeline runs no code of a repository and loads no pickles, so it takes neither custom_pipeline "
                "nor use_safetensors=False; use diffusers.DiffusionPipeline where you trust the source."
            )
        for name in hub_options.keys() - set(HUB_OPTIONS):
            known = ", ".join(("unet, scheduler, variant, torch_dtype, device_map", *HUB_OPTIONS))
            raise ValueError(f"from_pretrained does not know the keyword {name!r}; it knows {known}.")
        source = pretrained_model_name_or_path
        folder = Path(source)
        if not folder.is_dir():
            try:
                folder = Path(cls.download(str(source), unet=unet, variant=variant, **hub_options))
            except HFValidationError as error:
                raise ValueError(f"{str(source)!r} is neither a folder here nor the id of a repository.") from error
        network_class, own_class = read_index(folder)
        samplers = read_samplers(folder, variant) if unet is None else None
        if unet is None:
            precision = _precision(torch_dtype if dtype is None else dtype)
            unet = load_network(network_class, part_folder(folder, "unet"), variant, precision).to(_device(device_map))
        if scheduler is None:
            scheduler = from_config(own_class, part_folder(folder, "scheduler") / own_class.config_name)
        loaded = cls(unet, scheduler)
        loaded.samplers = samplers
        loaded.register_to_config(_name_or_path=str(source))
        return loaded

    @classmethod
    def download(
        cls, pretrained_model_name: str, unet: ModelMixin | None = None, variant: str | None = None, **hub_options
    ) -> str:
        """Download the configs and safetensors of a repository, nothing else, and return their folder in the cache.

        Args:
            pretrained_model_name: the id of a repository.
            unet: where it is not None, the weights are not downloaded.
            variant: which of several saved sets of weights to download, such as "fp16".
            hub_options: revision, token, cache_dir, local_files_only, force_download.

        Raises:
            ValueError: where the repository has no such weights.
            OSError: where the repository or revision does not exist or may not be read.
        """
        patterns = ["*.json"]
        if unet is None:
            stem = STEM if variant is None else f"{STEM}.{variant}"
            patterns += [f"{part}{stem}{end}.safetensors" for part in ("unet/", "") for end in ("", "-*")]
        options = {name: value for name, value in hub_options.items() if value is not None}
        folder = Path(snapshot_download(pretrained_model_name, allow_patterns=patterns, **options))
        part = part_folder(folder, "unet")
        if unet is None and not weight_files(part, variant):
            names = [path.name for path in part.iterdir()]
            if not options.get("local_files_only"):
                chosen = {name: options[name] for name in ("revision", "token") if name in options}
                files = HfApi().list_repo_files(pretrained_model_name, **chosen)
                inside = "" if part == folder else "unet/"
                names = [name.removeprefix(inside) for name in files if name.startswith(inside)]
            raise ValueError(why_none(f"{pretrained_model_name}/unet", names, variant))
        return str(folder)

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        *args,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the pipeline as a folder that this package and diffusers load; the keywords are those of diffusers.

        Raises:
            ValueError: for safe_serialization=False, since from_pretrained loads no pickles, and for push_to_hub=True,
                since diffusers would make a public repository with an empty card.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False writes pickles, which from_pretrained does not load; leave it.")
        if push_to_hub:
            raise ValueError("save_pretrained takes no push_to_hub=True; call push_to_hub(repo_id) of the pipeline.")
        super().save_pretrained(save_directory, safe_serialization, variant, *args, **kwargs)
        folder = Path(save_directory)
        (folder / SAMPLERS_FILE).unlink(missing_ok=True)  # an earlier save may have left it
        if self.samplers is not None and self.samplers.fit(folder, variant):
            self.samplers.write(folder)

    def use_recommended_sampler(self) -> dict[str, Any]:
        """Plug in the scheduler that `ddpm-pipe evaluate --sweep` found to be the best for its cost.

        Returns:
            The keywords of a call with that sampler: `pipeline(batch_size=16, **options)`. They are num_inference_steps
            or timesteps and, where they are not the defaults, eta and guidance_scale; class labels are yours.

        Raises:
            ValueError: where the pipeline carries no such sampler.
        """
        if self.samplers is None or self.samplers.recommended is None:
            raise ValueError("this pipeline carries no recommended sampler; ddpm-pipe evaluate --sweep finds one.")
        self.scheduler = self.samplers.recommended.make_scheduler(self.own_scheduler)
        return self.samplers.recommended.call_options()

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and, beside it, the code that diffusers needs. `save_pretrained` calls this."""
        super().save_config(save_directory, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        sources: dict[str, list[ModuleType]] = {}
        index["_class_name"] = DDPMPipeline.__name__
        if isinstance(self.unet, DDPMUNet2DModel):
            index["unet"][0], sources["unet"] = CODE["unet"], [unet]
        if isinstance(self.scheduler, tuple(OWN_SCHEDULERS.values())):
            if is_faithful(self.scheduler):
                index["scheduler"][0] = "diffusers"
            else:
                index["scheduler"][0] = CODE["scheduler"]
                sources["scheduler"] = [checks, noise, prediction, schedulers]
        if not stock_pipeline_samples(self.unet, self.scheduler):
            index["_class_name"] = [CODE["pipeline"], PixelDiffusionPipeline.__name__]
            sources["pipeline"] = [checks, noise, prediction, compatibility, pipeline]
        index.pop("_name_or_path", None)  # where it was loaded from is private
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")
        for part, name in CODE.items():
            file = (folder if part == "pipeline" else folder / part) / f"{name}.py"
            if part in sources:
                file.write_text(bundle(*sources[part]))
            else:
                file.unlink(missing_ok=True)  # an earlier save may have left it

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = True,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
    ) -> str:
        """Share the pipeline on the Hub, with a card of what is known of it. `ddpm-pipe push` shares a whole run.

        Args:
            repo_id: org/name of the repository, which is made where it does not exist.
            private: whether to hide the repository from others; only False makes it public.
            commit_message: message of the commit.
            token: token of the Hub; None takes that of the login.
            create_pr: whether to open a pull request instead of a commit.
            variant: part of the names of the weight files, such as "fp16".

        Returns:
            The address of the repository, which is printed too.

        Raises:
            ValueError: where the Hub cannot be reached or refuses, or the repository is public without private=False.
        """
        message = commit_message or f"Push {type(self).__name__}"
        with tempfile.TemporaryDirectory() as saved, tempfile.TemporaryDirectory() as staged:
            self.save_pretrained(saved, variant=variant)
            stage_pipeline(Path(saved), Path(staged))
            make_card(None, Path(staged), repo_id).save(Path(staged) / "README.md")
            repeat, public = f"pipeline.push_to_hub({repo_id!r})", private is False
            return upload(Path(staged), repo_id, message, repeat, public, token=token, create_pr=create_pr)


def is_faithful(scheduler: SchedulerMixin) -> bool:
    """Return whether the diffusers scheduler of the same name and config draws the same images."""
    values = FAITHFUL[type(scheduler).__name__]
    return all(scheduler.config[key] in accepted for key, accepted in values.items())


def stock_pipeline_samples(unet: ModelMixin, scheduler: SchedulerMixin) -> bool:
    """Return whether diffusers' DDPMPipeline, which gives the network only x_t and t, samples this network rightly."""
    name, config = type(scheduler).__name__, unet.config
    needs_more = config.get("num_class_embeds") is not None or config.get("self_condition")
    learned_variance = config.out_channels != config.in_channels
    # our pipeline derives the noise of DDIM anew from a clipped x0, and the stock pipeline does not
    clips = scheduler.config.get("clip_sample") or scheduler.config.get("thresholding")
    draws_alike = name == "LCMScheduler" or (name == "DDIMScheduler" and not clips)
    is_simple = name == "DDPMScheduler" or (draws_alike and not learned_variance)
    return is_simple and not needs_more


def bundle(*modules: ModuleType) -> str:
    """Join the sources of modules of this package in one text; each module must follow those that it imports.

    diffusers fetches one file for a part, and not the files that this one imports.
    """
    texts = []
    for module in modules:
        text = Path(str(module.__file__)).read_text()
        inside = [
            n for n in ast.parse(text).body if isinstance(n, ast.ImportFrom) and (n.module or "")[:9] == "ddpm_pipe"
        ]
        dropped = {line for node in inside for line in range(node.lineno, (node.end_lineno or 0) + 1)}
        texts.append("\n".join(line for i, line in enumerate(text.splitlines(), 1) if i not in dropped))
    return "\n\n".join(texts) + "\n"


# ---------------------------------------------------------------- loading the parts


def read_index(folder: Path) -> tuple[type[ModelMixin], type[SchedulerMixin]]:
    """Return the classes of the network and of the scheduler that model_index.json names.

    Raises:
        ValueError: for a folder without a pipeline, naming those near it, or for a pipeline of other parts.
    """
    file = folder / DDPMPipeline.config_name
    if not file.is_file():
        raise ValueError(_where_else(folder))
    index = read_json(file)
    made_of = f"DDPMPipeline is made of a scheduler and a unet, which is a {' or '.join(NETWORKS)}"
    kind = index.get("_class_name")
    parts = {name for name in index if not name.startswith("_")}
    if parts != {"unet", "scheduler"}:
        raise ValueError(f"{file} describes a {kind} of {', '.join(sorted(parts))}; {made_of}.")
    if not isinstance(kind, str) and kind != [CODE["pipeline"], PixelDiffusionPipeline.__name__]:
        raise ValueError(f"{file} has the _class_name {kind!r}, a pipeline of its own code, which is not executed.")
    for part in sorted(parts):
        if not (isinstance(index[part], list) and [type(entry) for entry in index[part]] == [str, str]):
            raise ValueError(f"{file} must name the library and the class of its {part}, not {index[part]!r}.")
    library, name = index["unet"]
    if library not in LIBRARIES or name not in NETWORKS:
        raise ValueError(f"{file} has a unet {name} of {library}; {made_of}.")
    return NETWORKS[name], _scheduler_class(file, *index["scheduler"])


def _scheduler_class(file: Path, library: str, name: str) -> type[SchedulerMixin]:
    found = scheduler_class(name)
    if found is not None and library in (LIBRARIES if name in OWN_SCHEDULERS else {"diffusers"}):
        return found
    raise ValueError(
        f"{file} has a scheduler {name} of {library}; schedulers are those that diffusers has here and this package's."
    )


def _where_else(folder: Path) -> str:
    """Return a sentence that says where the pipeline is that a folder does not hold itself."""
    inside = sorted(str(file.parent) for file in folder.glob(f"*/{DDPMPipeline.config_name}"))
    if inside:
        return f"{folder} is not a pipeline's folder but holds {', '.join(inside)}; give one of these."
    if (folder.absolute().parent / DDPMPipeline.config_name).is_file():
        return f"{folder} is a part of the pipeline {folder.absolute().parent}; give that."
    return f"{folder} holds no pipeline: {DDPMPipeline.config_name} is missing."


def _device(device_map: str | torch.device | None) -> torch.device:
    if device_map == "balanced":
        return torch.device(get_device())
    try:
        return torch.device(device_map or "cpu")
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r} must be 'balanced' or a device, as 'cuda'.") from error


def _precision(dtype: torch.dtype | dict[str, torch.dtype] | None) -> torch.dtype:
    if isinstance(dtype, dict):
        dtype = dtype.get("unet", dtype.get("default"))
    if not isinstance(dtype or torch.float32, torch.dtype):
        raise ValueError(f"torch_dtype={dtype!r} must be a torch.dtype, as torch.float16.")
    return dtype or torch.float32
