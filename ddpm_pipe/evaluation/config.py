"""The config of `evaluate`: what is measured, and of which model."""

import itertools
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from ddpm_pipe.config import NonNegativeInt, Place, PositiveInt
from ddpm_pipe.sampling.config import SampleConfig, parse_seeds

MIN_COUNT = 20
"""Fewest images that can be measured: the Inception score needs 10 parts of at least two images."""

SWEPT: dict[str, type] = {"steps": int, "eta": float, "guidance_scale": float} | dict.fromkeys(
    ("model", "revision", "dtype", "scheduler", "class_labels"), str
)
"""Options of sampling that a sweep may change, and the types of their values."""


class EvaluateConfig(SampleConfig):
    """Measurements"""

    data: Place
    """real images: a folder, a parquet or arrow file, or the id of a dataset on the Hub"""
    train_split: str = "train"
    """split of the training images, with which the generated images are compared"""
    test_split: str = "test"
    """split of the held-out images, for bits per dimension and neighbours"""
    output_dir: Place | None = None
    """folder for evaluation.json and the pictures; the pipeline folder that is measured if not given"""
    num_images: NonNegativeInt = 50_000
    """number of generated images, whose seeds count up from 0; 0 draws none"""
    seeds: str | None = None
    """seeds of the generated images in place of num_images, such as 50000-99999; another set gives another FID"""
    features: str = "inception"
    """inception, or a file of TorchScript or an exported program; it is a program that is run here, so give only one
    that you trust"""
    bits_images: NonNegativeInt = 0
    """number of real images whose bits per dimension are measured; 0 measures none"""
    bits_terms: PositiveInt = 100
    """how many of the T - 1 terms of the bound are computed for each of these images"""
    neighbours: NonNegativeInt = 0
    """number of generated images that are shown with their nearest training images; 0 shows none"""
    sweep: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    """option values, each combination of which is measured, such as steps=10,20,50 eta=0,1 model=a,b"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits_images == 1:
            raise ValueError("bits_images=1 has no standard error; it must be 0, or at least 2.")
        count = len(self.sample_seeds)
        if self.neighbours > count:
            asked = f"num_images={count}" if self.seeds is None else f"the {count} images of seeds={self.seeds!r}"
            raise ValueError(f"neighbours={self.neighbours} must be at most {asked}.")
        if self.seeds is not None and count < MIN_COUNT:
            raise ValueError(f"seeds={self.seeds!r} ({count} images) must be at least {MIN_COUNT}.")
        if 0 < count < MIN_COUNT:
            raise ValueError(f"num_images={count} must be 0, or at least {MIN_COUNT}.")
        if not (count or self.bits_images):
            raise ValueError("num_images and bits_images are both 0, so there is nothing to measure.")
        for point in self.points() if self.sweep else ():
            self.replace(sweep=[], **point)
        return self

    @property
    def sample_seeds(self) -> list[int]:
        """The seeds of the generated images."""
        return list(range(self.num_images)) if self.seeds is None else parse_seeds(self.seeds)

    @property
    def described_seeds(self) -> str:
        """The seeds as a protocol writes them."""
        return f"0-{self.num_images - 1}" if self.seeds is None else self.seeds

    def points(self) -> list[dict[str, Any]]:
        """Return the settings of the sweep, each a dict of changed options; a single empty dict without a sweep.

        Raises:
            ValueError: for an option that `SWEPT` does not hold, or a value that is not of the option's type.
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
