"""Samplers that a pipeline carries: timesteps that were searched for few steps, and the sampler that is recommended.

They lie in a file of the pipeline folder that names the weights that they were found for.
"""

import inspect
import json
from pathlib import Path
from typing import Any, Self

import diffusers
from diffusers import ConfigMixin, SchedulerMixin
from pydantic import Field

from ddpm_pipe.checks import check_choice
from ddpm_pipe.config import Config, Float, Int, PositiveInt
from ddpm_pipe.run.files import replace_text, sha256
from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler
from ddpm_pipe.weights import SAMPLERS_FILE, part_folder, read_json, weight_files

OWN_SCHEDULERS = {cls.__name__: cls for cls in (DDPMScheduler, DDIMScheduler)}


def scheduler_class(name: str) -> type[SchedulerMixin] | None:
    """Return this package's scheduler of that name, or else that of diffusers; None where there is none."""
    if name in OWN_SCHEDULERS:
        return OWN_SCHEDULERS[name]
    found = getattr(diffusers.schedulers, name, None) if name.endswith("Scheduler") else None
    is_public = isinstance(found, type) and issubclass(found, SchedulerMixin) and issubclass(found, ConfigMixin)
    return found if is_public else None


def accepted_keys(cls: type[SchedulerMixin]) -> list[str]:
    """Return the config keys that a scheduler takes."""
    return [key for key in inspect.signature(cls.__init__).parameters if key not in ("self", "kwargs")]


def make_scheduler(cls: type[SchedulerMixin], own: SchedulerMixin, options: dict[str, Any]) -> SchedulerMixin:
    """Make a scheduler from a model's own one; `options` are config keys that differ.

    Raises:
        ValueError: where the class does not take the options.
    """
    for key in options:
        check_choice("scheduler_options", key, accepted_keys(cls))
    try:
        return cls.from_config(own.config, **options)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ValueError(f"scheduler_options={json.dumps(options)} do not suit {cls.__name__}: {error}") from error


def settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the config of a scheduler without its list of betas, which `check_scheduler` compares."""
    return {key: scheduler.config[key] for key in accepted_keys(type(scheduler)) if key != "trained_betas"}


def options_of(scheduler: SchedulerMixin, own: SchedulerMixin) -> dict[str, Any]:
    """Return the config keys of a scheduler that differ from what `from_config` makes of a model's own one."""
    plain = settings(type(scheduler).from_config(own.config))
    return {key: value for key, value in settings(scheduler).items() if value != plain[key]}


class Sampler(Config):
    """A scheduler and how the pipeline is called with it"""

    scheduler: str
    """class of the scheduler"""
    scheduler_options: dict[str, Any] = {}
    """config keys that differ from what `from_config` makes of the model's own scheduler"""
    steps: PositiveInt
    """number of sampling steps"""
    timesteps: list[Int] | None = Field(None, min_length=1)
    """the timesteps, decreasing; None where the scheduler chooses them"""
    eta: Float = 0.0
    """amount of noise that DDIM adds"""
    guidance_scale: Float = 1.0
    """scale of classifier-free guidance"""
    class_labels: str | None = None
    """classes that were drawn, as `generate` takes them; None for images without a class"""
    protocol: str
    """how the sampler was found, in one line"""

    @classmethod
    def of(cls, scheduler: SchedulerMixin, own: SchedulerMixin, **values: Any) -> Self:
        """Describe a scheduler that was made from a model's own one; `values` are the other fields."""
        return cls(scheduler=type(scheduler).__name__, scheduler_options=options_of(scheduler, own), **values)

    def make_scheduler(self, own: SchedulerMixin) -> SchedulerMixin:
        """Make the scheduler from a model's own one.

        Raises:
            ValueError: where diffusers has no such scheduler here, or it does not take the options.
        """
        found = scheduler_class(self.scheduler)
        if found is None:
            raise ValueError(f"scheduler={self.scheduler!r} is none of this package or of diffusers here.")
        return make_scheduler(found, own, self.scheduler_options)

    def call_options(self) -> dict[str, Any]:
        """Return the keywords of the pipeline's call, without labels."""
        length = {"num_inference_steps": self.steps} if self.timesteps is None else {"timesteps": self.timesteps}
        eta = {"eta": self.eta} if self.eta else {}
        return length | eta | ({"guidance_scale": self.guidance_scale} if self.guidance_scale != 1 else {})

    def has(self, scheduler: SchedulerMixin, own: SchedulerMixin) -> bool:
        """Return whether `make_scheduler` would make this scheduler."""
        if self.scheduler != type(scheduler).__name__:
            return False
        made = self.make_scheduler(own)
        return type(made) is type(scheduler) and settings(made) == settings(scheduler)

    @property
    def conditions(self) -> tuple:
        """Steps, eta, guidance, and whether there are labels: what the timesteps of a scheduler depend on."""
        return self.steps, self.eta, self.guidance_scale, self.class_labels is not None


class Samplers(Config):
    """Samplers of a pipeline"""

    unet_sha256: dict[str, str]
    """checksums of the weights that they were found for, by the name of the file"""
    learned: list[Sampler] = []
    """samplers whose timesteps were searched"""
    recommended: Sampler | None = None
    """the sampler of the fewest network calls whose images are nearly as good as the best of a sweep"""

    def timesteps_for(self, scheduler: SchedulerMixin, own: SchedulerMixin, conditions: tuple) -> list[int] | None:
        """Return the timesteps that were searched for a call; None where there are none.

        Args:
            scheduler: the scheduler that takes the steps.
            own: the model's own scheduler.
            conditions: those of the call, as `Sampler.conditions`.
        """
        found = (each for each in self.learned if each.conditions == conditions and each.has(scheduler, own))
        return next((each.timesteps for each in found), None)

    def with_learned(self, sampler: Sampler) -> Self:
        """Return these samplers with one more, which takes the place of one for the same scheduler and conditions."""

        def place(each: Sampler) -> tuple:
            return each.scheduler, each.scheduler_options, each.conditions

        return self.replace(learned=[*(each for each in self.learned if place(each) != place(sampler)), sampler])

    def fit(self, folder: Path, variant: str | None = None) -> bool:
        """Return whether the weights in a pipeline folder are those that these samplers were found for."""
        found = {path.name: sha256(path) for path in weight_files(part_folder(folder, "unet"), variant)}
        return found.items() <= self.unet_sha256.items()

    def write(self, folder: Path) -> None:
        """Write the file of a pipeline folder."""
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=2)
        replace_text(folder / SAMPLERS_FILE, text + "\n")


def read_samplers(folder: Path, variant: str | None = None) -> Samplers | None:
    """Read the samplers of a pipeline folder.

    A printed sentence says so where they were found for other weights than those of the variant.

    Returns:
        The samplers; None where there are none for these weights.

    Raises:
        ValueError: where the file cannot be read, naming it.
    """
    file = folder / SAMPLERS_FILE
    if not file.exists():
        return None
    values = read_json(file)
    try:
        samplers = Samplers(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not what ddpm-pipe writes: {error}") from error
    if samplers.fit(folder, variant):
        return samplers
    print(f"{file} was made for other weights than those of {folder}; it is left out: search and evaluate again.")
    return None
