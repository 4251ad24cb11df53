"""What is measured of which model."""

import itertools
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from ddpm_pipe.config import NonNegativeInt, Place, PositiveInt
from ddpm_pipe.sampling.config import SampleConfig

SWEPT: dict[str, type] = {"steps": int, "eta": float, "guidance_scale": float} | dict.fromkeys(
    ("model", "revision", "dtype", "scheduler", "class_labels"), str
)
"""Options of sampling that a sweep may change, and the types of their values."""


class EvaluateConfig(SampleConfig):
    """Measurements"""

    data: Place
    """real images: a folder, a parquet or arrow file, or the id of a dataset on the Hub"""
    train_split: str = "train"
    """split of the training images, which samples are compared with"""
    test_split: str = "test"
    """split of the images held out, for bits per dimension and neighbours"""
    output_dir: Place | None = None
    """folder of evaluation.json and pictures; the pipeline folder that is measured if not given"""
    num_images: NonNegativeInt = 50_000
    """generated images; 0 for none"""
    first_seed: NonNegativeInt = 0
    """seed of the first of them; with another, the same model gives another sample of its FID"""
    features: str = "inception"
    """inception, or a file of TorchScript or an exported program: a program that is run here, so one that you trust"""
    bits_images: NonNegativeInt = 0
    """real images whose bits per dimension are measured; 0 for none"""
    bits_terms: PositiveInt = 100
    """terms of the bound computed for each of them, of T - 1"""
    neighbours: NonNegativeInt = 0
    """generated images shown with their nearest training images; 0 for none"""
    sweep: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    """values of options to measure one after another: steps=10,20,50 eta=0,1 model=a,b"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits_images == 1:
            raise ValueError("bits_images=1 has no standard error; it must be 0, or at least 2.")
        if self.neighbours > self.num_images:
            raise ValueError(f"neighbours={self.neighbours} must be at most num_images={self.num_images}.")
        for point in self.points():
            self.model_copy(update={"sweep": []}).replace(**point)
        return self

    @property
    def seeds(self) -> range:
        """The seeds of the generated images."""
        return range(self.first_seed, self.first_seed + self.num_images)

    def points(self) -> list[dict[str, Any]]:
        """The settings of the sweep, one dict of changed options for each; a single empty one without a sweep.

        Raises:
            ValueError: for an option that does not belong to sampling, or a value that is not one of it.
        """
        axes = []
        for text in self.sweep:
            name, _, values = text.partition("=")
            if name not in SWEPT or not values:
                raise ValueError(f"sweep={text!r} must be option=value,value,... with one of {', '.join(SWEPT)}.")
            try:
                axes.append([(name, SWEPT[name](value)) for value in values.split(",")])
            except ValueError as error:
                raise ValueError(f"sweep={text!r}: {name} takes values of type {SWEPT[name].__name__}.") from error
        return [dict(point) for point in itertools.product(*axes)]
