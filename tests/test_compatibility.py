"""Every scheduler that diffusers exports samples what a network was trained for, or is refused by name.

The network is the best one for pixels that are draws of N(MEAN, STD^2): what comes out must have that mean and that
standard deviation.
"""

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from test_pipeline import ALPHA_BAR, MEAN, STD, GaussianDenoiser, final_sample, our_pipe, refused, sample, seeded
from torch.testing import assert_close

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.compatibility import set_timesteps

# name -> by how much the standard deviation may differ after 100 steps besides 4 standard errors of its estimate: what
# the discretisation of a first-order method costs (measured: DDPM 7 %, DDIM 3 %), and 2 % for the others
SAMPLES = dict.fromkeys(
    [
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    ],
    0.02,
)
SAMPLES |= dict.fromkeys(["DDIMScheduler", "DDIMParallelScheduler", "EulerDiscreteScheduler"], 0.04)
SAMPLES |= dict.fromkeys(["DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler"], 0.09)

IN_TESTS_OF_THEIR_OWN = ("LCMScheduler", "TCDScheduler")

REFUSED = {
    **dict.fromkeys(
        [
            "AmusedScheduler",
            "BlockRefinementScheduler",
            "CMStochasticIterativeScheduler",
            "CogVideoXDDIMScheduler",
            "CogVideoXDPMScheduler",
            "ConsistencyDecoderScheduler",
            "CosineDPMSolverMultistepScheduler",
            "DDPMWuerstchenScheduler",
            "DiscreteDDIMScheduler",
            "EDMDPMSolverMultistepScheduler",
            "EDMEulerScheduler",
            "EntropyBoundScheduler",
            "FlowMapEulerDiscreteScheduler",
            "FlowMatchEulerDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "FlowMatchLCMScheduler",
            "HeliosDMDScheduler",
            "HeliosScheduler",
            "IPNDMScheduler",
            "KarrasVeScheduler",
            "LTXEulerAncestralRFScheduler",
            "MiniMaxH3Scheduler",
            "PiflowScheduler",
            "RFD4ProteinaScheduler",
            "SCMScheduler",
            "ScoreSdeVeScheduler",
            "ScoreSdeVpScheduler",
            "VQDiffusionScheduler",
        ],
        "other noise levels",
    ),
    **dict.fromkeys(["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"], "goes from an image to noise"),
    "RePaintScheduler": "needs more for a step .*: original_image, mask",
    "UnCLIPScheduler": "needs more for a step .*: prev_timestep",
}
"""name -> why."""

ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "UnCLIPScheduler": {},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
"""Of the schedulers that cannot be made with our config."""

EXPORTED = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))


def plugged(cls, predicted: str = "epsilon", network=GaussianDenoiser, spacing="trailing", **config) -> DDPMPipeline:
    """A model of this package with a scheduler made with its config and `config` plugged in."""
    own = DDPMScheduler(clip_sample=False, prediction_type=predicted, timestep_spacing=spacing)
    pipe = our_pipe(network(prediction_type=predicted), own)
    pipe.scheduler = cls.from_config(own.config, **config)
    return pipe


def assert_drawn_from_the_data(x0: torch.Tensor, tolerance: float) -> None:
    count = x0.numel()
    assert abs(x0.mean().item() - MEAN) < 4 * STD / count**0.5 + 0.01
    assert abs(x0.std().item() / STD - 1) < 4 / (2 * count) ** 0.5 + tolerance


@pytest.mark.parametrize("name", EXPORTED)
def test_each_scheduler_of_diffusers_samples_or_is_refused_by_name(name):
    assert name in {*SAMPLES, *IN_TESTS_OF_THEIR_OWN, *REFUSED}, f"{name} is new: measure it, and decide"
    cls = getattr(diffusers.schedulers, name)
    if not issubclass(cls, diffusers.SchedulerMixin):
        pytest.skip(f"{name} needs a library that is not installed")
    if name in SAMPLES:
        generator = None if name == "DPMSolverSDEScheduler" else seeded()
        torch.manual_seed(0)
        for predicted in ("epsilon", "v_prediction"):
            pipe = plugged(cls, predicted)
            x0 = final_sample(pipe, batch_size=32, steps=100, generator=generator)
            assert_drawn_from_the_data(x0, SAMPLES[name])
    elif name in REFUSED:
        own = DDPMScheduler()
        scheduler = cls(**ARGUMENTS[name]) if name in ARGUMENTS else cls.from_config(own.config)
        for steps in (1, 50):
            # of these two, the noise levels alone would be right for a model that was saved with them
            own_scheduler = scheduler if name in ("UnCLIPScheduler", "RePaintScheduler") else own
            pipe = our_pipe(GaussianDenoiser(), own_scheduler)
            pipe.scheduler = scheduler
            with refused(f"scheduler={name} .*{REFUSED[name]}"):
                sample(pipe, steps=steps)


class ConsistencyModel(GaussianDenoiser):
    """What distillation makes of the best network: it predicts the end of the flow through x_t."""

    def forward(self, sample, timestep):
        alpha_bar = ALPHA_BAR[timestep.long()].float()
        x0 = MEAN + STD * (sample - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()
        return UNet2DOutput(sample=(sample - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt())


@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_lcm_samples_a_network_that_was_distilled_for_it(steps):
    pipe = plugged(diffusers.LCMScheduler, network=ConsistencyModel)
    assert_drawn_from_the_data(final_sample(pipe, batch_size=32, steps=steps), 0.02)


def test_tcd_without_noise_takes_the_steps_of_ddim():
    """Up to the noise of timestep 0, where TCD ends."""
    timesteps = list(range(999, 0, -100))
    tcd = plugged(diffusers.TCDScheduler, set_alpha_to_one=False)
    ddim = plugged(DDIMScheduler, set_alpha_to_one=False)
    tcd, ddim = (final_sample(pipe, steps=None, timesteps=timesteps) for pipe in (tcd, ddim))
    assert_close(tcd, ddim, rtol=0, atol=0.01)


# ---------------------------------------------------------------- what makes a good scheduler wrong


@pytest.mark.parametrize("cls", [DDIMScheduler, diffusers.HeunDiscreteScheduler])
def test_noise_levels_other_than_the_models_are_refused(cls):
    pipe = plugged(DDPMScheduler)
    pipe.scheduler = cls(beta_end=0.012)
    with refused(f"scheduler={cls.__name__} has other noise levels than the model was trained with"):
        sample(pipe)
    with refused("other noise levels"):
        sample(DDPMPipeline.from_pipe(pipe))
    pipe.scheduler = cls.from_config(DDPMScheduler().config)
    assert sample(DDPMPipeline.from_pipe(pipe)).isfinite().all()


def test_output_that_would_be_misread_is_refused():
    pipe = plugged(DDPMScheduler, "v_prediction")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    with refused("scheduler=EulerDiscreteScheduler has prediction_type='epsilon', but the model predicts 'v_pred"):
        sample(pipe)


@pytest.mark.parametrize(
    ("cls", "predicted", "config", "reason"),
    [
        (diffusers.DPMSolverMultistepScheduler, "epsilon", {"use_flow_sigmas": True}, "noise level .* first timestep"),
        (diffusers.UniPCMultistepScheduler, "epsilon", {"use_flow_sigmas": True}, "noise level .* first timestep"),
        (
            diffusers.EulerDiscreteScheduler,
            "v_prediction",
            {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True},
            "noise level .* first timestep",
        ),
        (
            diffusers.DPMSolverMultistepScheduler,
            "epsilon",
            {"prediction_type": "flow_prediction"},
            "prediction_type='flow_prediction' is unknown; use one of epsilon, sample, v_prediction",
        ),
    ],
    ids=str,
)
def test_config_that_leaves_the_chain_is_refused(cls, predicted, config, reason):
    pipe = plugged(cls, predicted, **config)
    with refused(f"scheduler={cls.__name__}.*{reason}"):
        sample(pipe, steps=20)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("cls", [diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler])
def test_other_spacings_of_the_same_chain_are_right(cls, option):
    x0 = final_sample(plugged(cls, **{option: True}), batch_size=32, steps=100)
    assert_drawn_from_the_data(x0, 0.05)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_all_leading_timesteps_of_schedulers_that_have_none_are_refused(name):
    """They take T // (count + 1) for the distance, which is 0 for all T timesteps."""
    with refused(f"scheduler={name} has no 1000 timesteps that fall with timestep_spacing='leading'; take 'trailing'"):
        sample(plugged(getattr(diffusers, name), spacing="leading"), steps=None)


def test_timesteps_that_are_not_finite_are_refused():
    """As those of KDPM2AncestralDiscreteScheduler are on some CPUs, where the chain ends in nearly pure noise."""
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler()
    scheduler.set_timesteps = lambda *_, **__: setattr(scheduler, "timesteps", torch.tensor([999.0, torch.nan, 500.0]))
    with refused("scheduler=KDPM2AncestralDiscreteScheduler has timesteps that are not finite"):
        set_timesteps(scheduler, 2, None)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"])
def test_prediction_that_a_scheduler_does_not_know_is_refused_by_name(name):
    with refused(f"scheduler={name} cannot sample this model with these options: prediction_type"):
        sample(plugged(getattr(diffusers, name), "sample"), steps=10)


@pytest.mark.parametrize(("name", "steps"), [("LCMScheduler", None), ("TCDScheduler", 51), ("PNDMScheduler", 2)])
def test_number_of_steps_that_a_scheduler_cannot_take_is_refused_by_name(name, steps):
    with refused(f"num_inference_steps={steps or 1000} does not suit {name}: "):
        sample(plugged(getattr(diffusers, name)), steps=steps)


def test_generator_is_refused_by_a_scheduler_with_noise_of_its_own():
    """DPMSolverSDEScheduler is one, and can be made only with torchsde; so this one is made to look like it."""
    pipe = plugged(diffusers.DPMSolverMultistepScheduler)
    pipe.scheduler.noise_sampler = None
    with refused("generator has no meaning for DPMSolverMultistepScheduler"):
        sample(pipe)
    assert sample(pipe, generator=None).isfinite().all()


# ---------------------------------------------------------------- timesteps that are chosen

TAKES_TIMESTEPS = [
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler, *(getattr(diffusers, name) for name in TAKES_TIMESTEPS)])
def test_chosen_timesteps_are_those_of_the_same_number_of_steps(cls):
    by_count = plugged(cls)
    expected = sample(by_count, steps=5)
    chosen = list(dict.fromkeys(by_count.scheduler.timesteps.long().tolist()))
    images = sample(plugged(cls), steps=None, timesteps=chosen)
    assert_close(images, expected, rtol=0, atol=2e-3)
    other = sample(plugged(cls), steps=None, timesteps=[999, 700, 400, 100, 0])
    assert (other - expected).abs().max() > 0.01


@pytest.mark.parametrize("cls", [DDIMScheduler, diffusers.DDPMScheduler, diffusers.EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "timesteps", [[0, 500, 999], [999, 0, 500], [5000, 10], [500.5, 1], [], [[5], [1]], 5, "51", [True, False]], ids=str
)
def test_timesteps_that_do_not_fall_inside_the_chain_are_refused(cls, timesteps):
    with refused("timesteps must be strictly decreasing values from 999 to 0, all whole numbers"):
        sample(plugged(cls), steps=None, timesteps=timesteps)


def test_timesteps_are_refused_where_they_cannot_be_honoured():
    with refused("timesteps cannot be given to UniPCMultistepScheduler; give num_inference_steps"):
        sample(plugged(diffusers.UniPCMultistepScheduler), steps=None, timesteps=[999, 0])
    with refused("timesteps and num_inference_steps contradict each other"):
        sample(plugged(DDIMScheduler), steps=2, timesteps=[999, 0])
    with refused(r"timesteps=\[999, 0\] does not suit DPMSolverMultistepScheduler: Cannot use"):
        pipe = plugged(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True)
        sample(pipe, steps=None, timesteps=[999, 0])
