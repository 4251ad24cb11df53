"""The configs of the page: which model it shows and where it is served, and how an image is drawn."""

from typing import Annotated

from pydantic import Field

from ddpm_pipe.config import Config, Float, NonNegativeInt, PositiveInt
from ddpm_pipe.sampling.config import LoadConfig

MAX_SEED = 2**53 - 1
"""Largest seed of the page: the largest whole number that a browser keeps exactly."""


class DemoConfig(LoadConfig):
    """Page"""

    host: str | None = None
    """address at which the page is served, such as 0.0.0.0 for other machines too; only to this machine if not given"""
    port: Annotated[PositiveInt, Field(le=65535)] | None = None
    """port at which the page is served; the first free one from 7860 if not given"""
    open: bool = True
    """open the page in the browser"""


class Settings(Config):
    """How an image is drawn"""

    seed: Annotated[NonNegativeInt, Field(le=MAX_SEED)] = 0
    """seed of the first image; each of the following ones has the next seed"""
    sampler: str = "dpm++"
    """recommended, own, or a scheduler by its short name"""
    steps: PositiveInt = 20
    """number of sampling steps; the recommended sampler has its own"""
    class_labels: str | None = None
    """balanced for all classes, which the seeds take in turn, or a class number; None draws without a class"""
    guidance_scale: Float = 1.0
    """scale of classifier-free guidance, which needs a class; without one it is not used"""
