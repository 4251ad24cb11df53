"""The recorded figures of the reference implementation (tests/golden/seed_diffusion.npz).

Each case is one configuration of the reference at T = 1000. It computed in float32, its tables included, so tables
agree to the rounding of 1 - alpha_bar near t = 0, and all else to a few 1e-6.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm_pipe.noise import add_noise, make_betas, posterior, posterior_coefficients, snr
from ddpm_pipe.objective import Objective
from ddpm_pipe.prediction import PREDICTIONS, eps_from_x0, loss_weight
from ddpm_pipe.schedulers import DDIMScheduler, DDPMScheduler

GOLDEN = np.load(Path(__file__).parent / "golden" / "seed_diffusion.npz")
PREDICTION_TYPES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


class Case:
    """One configuration of the reference: its figures by name, and its analytic stand-in for a network."""

    def __init__(self, name: str):
        self.config = ast.literal_eval(str(GOLDEN[f"{name}/config"]))
        self.figures = {
            key.removeprefix(f"{name}/"): torch.from_numpy(GOLDEN[key])
            for key in GOLDEN.files
            if key.startswith(f"{name}/") and not key.endswith("config")
        }
        self.prediction_type = PREDICTION_TYPES[self.config["objective"]]
        self.row = PREDICTIONS[self.prediction_type]
        self.betas = make_betas(self.config["beta_schedule"], self.config["T"])
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)
        self.t = self["t"].long()

    def __getitem__(self, key: str) -> Tensor:
        return self.figures[key]

    def model(self, x_t: Tensor, t: Tensor, self_cond: Tensor | None = None) -> Tensor:
        output = torch.tanh(0.7 * x_t + 0.3 * torch.sin(t.float().view(-1, 1, 1, 1) / 100))
        if self.config["self_condition"] and self_cond is not None:
            output = output + 0.25 * torch.tanh(self_cond)  # tanh(0) = 0 where it is not given
        return output

    def levels(self) -> tuple[Tensor, Tensor]:
        """alpha_bar of the recorded timesteps and of the ones before."""
        return self.alpha_bar[self.t], torch.cat([torch.ones(1).double(), self.alpha_bar])[self.t]


@pytest.fixture(scope="module", params=sorted({key.split("/")[0] for key in GOLDEN.files}))
def case(request) -> Case:
    return Case(request.param)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


# ---------------------------------------------------------------- tables


def test_betas(case):
    close(case.betas, case["betas"], atol=1e-4)


def test_alphas_cumprod(case):
    close(case.alpha_bar, case["alphas_cumprod"], atol=1e-6)


def posterior_tables(alpha_bar: Tensor) -> dict[str, Tensor]:
    of_x0, of_x_t, variance = posterior_coefficients(alpha_bar, torch.cat([torch.ones(1).double(), alpha_bar[:-1]]))
    deviation = variance.sqrt()
    return {"mean_coef1": of_x0, "mean_coef2": of_x_t, "variance": variance, "log_variance_clipped": deviation}


POSTERIOR_TOLERANCES = {"mean_coef1": 2e-4, "mean_coef2": 5e-7, "variance": 2e-7, "log_variance_clipped": 2e-6}


@pytest.mark.parametrize("name", POSTERIOR_TOLERANCES)
def test_posterior_tables_of_the_recorded_noise_levels(case, name):
    """mean_coef1 is the loosest: the reference divided beta by 1 - alpha_bar in float32, with alpha_bar near 1. The log
    of a variance is compared through the standard deviation, which is what multiplies the noise.
    """
    recorded = case[f"posterior_{name}"].double()
    expected = (recorded / 2).exp() if "log" in name else recorded
    close(posterior_tables(case["alphas_cumprod"])[name], expected, atol=POSTERIOR_TOLERANCES[name])


@pytest.mark.parametrize("name", ["mean_coef1", "mean_coef2", "variance"])
def test_posterior_tables_of_our_noise_levels(case, name):
    """Away from t = 0, where rounding alpha_bar to float32 loses nothing of 1 - alpha_bar."""
    close(posterior_tables(case.alpha_bar)[name][100:], case[f"posterior_{name}"][100:], atol=5e-5)


def test_p2_loss_weight(case):
    """The reference multiplies the plain loss of every objective by the factor of noise prediction."""
    gamma, k = case.config["p2_loss_weight_gamma"], case.config["p2_loss_weight_k"]
    weight = loss_weight("p2", "epsilon", snr(case.alpha_bar), gamma, k)
    close(weight, case["p2_loss_weight"], atol=5e-6)


# ---------------------------------------------------------------- training


def test_noisy_images(case):
    close(add_noise(case["x0"], case["noise"], case.alpha_bar[case.t]), case["xt"], atol=2e-6)


@pytest.mark.parametrize("self_conditioned", [False, True], ids=["selfcond0", "selfcond1"])
def test_training_loss(case, self_conditioned):
    """The self-conditioned loss first estimates x0 with no condition (and does not clip it), then conditions on it.

    What the reference recorded is mean(loss) * mean(weight) over the batch, not mean(loss * weight): it multiplied
    losses of shape (B, C H W) by weights of shape (B, 1, 1, 1), which pairs every image with every weight. That product
    checks losses and weights here, and is itself a defect not to be copied.
    """
    if self_conditioned and not case.config["self_condition"]:
        pytest.skip("recorded for self-conditioning only")

    def network(*args, **kwargs):
        return SimpleNamespace(sample=case.model(*args, **kwargs))

    scheduler = DDPMScheduler(beta_schedule=case.config["beta_schedule"], prediction_type=case.prediction_type)
    losses = Objective(scheduler, case.config["loss_type"])(
        network, case["x0"], case.t, case["noise"], self_conditioned
    )
    loss = losses.mean() * case["p2_loss_weight"][case.t].mean()
    close(loss, case[f"loss_selfcond{int(self_conditioned)}"], atol=1e-6)


# ---------------------------------------------------------------- sampling


def test_clipped_image(case):
    x0 = case.row.x0(case.model(case["xt"], case.t), case["xt"], case.alpha_bar[case.t])
    close(x0.clamp(-1, 1), case["pred_x0_clipped"], atol=2e-6)


def test_noise_of_the_clipped_image(case):
    """Noise prediction keeps the network's own noise; x0 and v derive it anew from the clipped image.

    2e-5: at t = 11 of the cosine schedule float32 rounding is divided by sqrt(1 - alpha_bar) = 0.03.
    """
    output, alpha_bar = case.model(case["xt"], case.t), case.alpha_bar[case.t]
    clipped = case.row.x0(output, case["xt"], alpha_bar).clamp(-1, 1)
    noise = output if case.prediction_type == "epsilon" else eps_from_x0(clipped, case["xt"], alpha_bar)
    close(noise, case["pred_noise_clipped"], atol=2e-5)


def test_posterior_mean(case):
    """2e-5: 1 - alpha_bar again, at t = 11 of the cosine schedule."""
    alpha_bar_t, alpha_bar_s = case.levels()
    x0 = case.row.x0(case.model(case["xt"], case.t), case["xt"], alpha_bar_t).clamp(-1, 1)
    close(posterior(x0, case["xt"], alpha_bar_t, alpha_bar_s)[0], case["posterior_mean"], atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("betas", ["named", "recorded"])
def test_ddim_trajectory(case, eta, betas):
    """All 50 steps from x_T to the image; the last step adds no noise, as its noise has variance 0."""
    schedule = (
        {"beta_schedule": case.config["beta_schedule"]}
        if betas == "named"
        else {"trained_betas": case["betas"].tolist()}
    )
    scheduler = DDIMScheduler(prediction_type=case.prediction_type, clip_sample=True, **schedule)
    times, noises = case[f"ddim_eta{eta}/times"].tolist(), case[f"ddim_eta{eta}/noises"]
    assert times[-1] == -1
    scheduler.set_timesteps(timesteps=times[:-1])
    assert len(noises) == len(scheduler.timesteps)

    x_t, x0 = noises[0], None
    for t, noise in zip(scheduler.timesteps, [*noises[1:], torch.zeros_like(x_t)]):
        x_t, x0 = scheduler.step(
            case.model(x_t, t, self_cond=x0),
            t,
            x_t,
            eta=eta,
            use_clipped_model_output=case.prediction_type != "epsilon",
            variance_noise=noise,
            return_dict=False,
        )
    close((x_t + 1) / 2, case[f"ddim_eta{eta}/image01"], atol=5e-6)
