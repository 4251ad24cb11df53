"""Consistency tuning: closed forms of the loss and of its schedule, then runs, and the pipelines that they leave."""

import math
import shutil
from itertools import pairwise
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import one_sentence
from PIL import Image
from runs import NETWORK, STOCK, assert_same, final_state, launch, write_config
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import dropout

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.consistency import HUBER, ConsistencyObjective, earlier_timestep
from ddpm_pipe.run.folder import Run
from ddpm_pipe.schedulers import DDPMScheduler
from ddpm_pipe.sharing.card import make_card
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.posthoc import held_out_losses

COSINE = {"beta_schedule": "cosine", "prediction_type": "sample"}
CHAINS = [DDPMScheduler(**COSINE), DDPMScheduler(**COSINE, rescale_betas_zero_snr=True)]
CHAINS += [DDPMScheduler(prediction_type="sample"), DDPMScheduler(20, **COSINE)]
chains = pytest.mark.parametrize("chain", CHAINS, ids=["cosine", "zero SNR", "linear", "short"])


def sigma(chain: DDPMScheduler, t: torch.Tensor) -> torch.Tensor:
    alpha_bar = chain.alpha_bar(t)
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def sigmas(chain: DDPMScheduler) -> torch.Tensor:
    return sigma(chain, torch.arange(-1, len(chain)))


class Denoiser(nn.Module):
    """Answers D(x_t) = `estimate(x_t, t)`, and remembers the timesteps that it saw."""

    def __init__(self, estimate):
        super().__init__()
        self.estimate, self.seen = estimate, []

    def forward(self, x, t, **conditions):
        self.seen.append(t)
        return SimpleNamespace(sample=self.estimate(x, t.double().view(-1, 1, 1, 1)))


# ---------------------------------------------------------------- the earlier timestep


@chains
def test_the_earlier_timestep_comes_closer_with_each_stage_and_ends_at_the_one_before(chain):
    t = torch.arange(len(chain))
    stages = [earlier_timestep(sigmas(chain), t, stage) for stage in range(1, 40)]
    for before, after in pairwise(stages):
        assert (before <= after).all() and (after < t).all()
    assert (stages[0] >= -1).all() and stages[0][0] == -1
    assert torch.equal(stages[-1], t - 1)


@chains
@pytest.mark.parametrize("stage", [1, 2, 4, 8])
def test_the_earlier_timestep_is_the_last_that_is_no_noisier_than_the_paper_asks_for(chain, stage):
    levels = sigmas(chain).tolist()
    for t, r in enumerate(earlier_timestep(sigmas(chain), torch.arange(len(chain)), stage).tolist()):
        n = 1 + 8 / (1 + math.exp(min(levels[t + 1], 700)))
        wanted = max(0.0, levels[t + 1] * (1 - n / 2**stage))
        assert levels[r + 1] <= wanted * (1 + 1e-12)
        assert r == t - 1 or levels[r + 2] > wanted * (1 - 1e-12)


def test_where_there_is_little_noise_the_first_stages_compare_with_the_image_itself():
    """n is nearly 5 there, so that the share 1 - n / 2^stage is negative up to the second stage."""
    t = torch.tensor([1, 20, 60])
    for stage in (1, 2):
        assert (earlier_timestep(sigmas(CHAINS[0]), t, stage) == -1).all()
    assert (earlier_timestep(sigmas(CHAINS[0]), t, 4)[1:] >= 0).all()


# ---------------------------------------------------------------- the loss


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 3, 4, 4, generator=draw)
    return x0, torch.tensor([0, 100, 400, 600, 900, 999]), eps


@chains
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_consistency_function_of_a_single_image_has_no_loss(chain, progress):
    """All paths end at the image, so D(x_t) is the image."""
    draw = torch.Generator().manual_seed(0)
    x0 = torch.rand(1, 3, 4, 4, generator=draw).expand(len(chain), -1, -1, -1)
    eps, t = torch.randn(x0.shape, generator=draw), torch.arange(len(chain))
    losses = ConsistencyObjective(chain)(Denoiser(lambda x, t: x0), x0, t, eps, False, progress)
    assert losses.abs().max() == 0


def gaussian_flow(x: torch.Tensor, alpha_bar: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """The end of the path through x_t where x0 is normal: the quantile of x_t is that of x0."""
    return mean + std * (x - alpha_bar.sqrt() * mean) / (alpha_bar * std**2 + 1 - alpha_bar).sqrt()


def gaussian_mean(x: torch.Tensor, alpha_bar: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """E[x0 | x_t] where x0 is normal."""
    gain = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
    return mean + gain * (x - alpha_bar.sqrt() * mean)


def pull(chain: DDPMScheduler, function, stages: int) -> torch.Tensor:
    """The derivative of the mean loss by a factor 1 + w of the deviation of D(x_t) from the mean 0.3, at w = 0."""
    draw = torch.Generator().manual_seed(0)
    eps, noise = torch.randn(2, 8, 1, 200, 200, generator=draw)
    x0, t = 0.3 + 0.5 * noise, torch.tensor([300, 400, 450, 500, 550, 600, 700, 800])
    w = torch.zeros((), requires_grad=True)

    def estimate(x, t):
        alpha_bar = chain.alpha_bar(t.long())
        return (0.3 + (1 + w) * (function(x.double(), alpha_bar, 0.3, 0.5) - 0.3)).float()

    losses = ConsistencyObjective(chain, stages)(Denoiser(estimate), x0, t, eps)
    (gradient,) = torch.autograd.grad(losses.mean(), w)
    return gradient.abs()


def test_the_loss_pulls_at_a_denoiser_and_not_at_the_consistency_function_of_normal_images():
    """As r approaches t, the gradient vanishes beside that at the mean (first order)."""
    far, near = (pull(CHAINS[0], gaussian_flow, n) / pull(CHAINS[0], gaussian_mean, n) for n in (4, 7))
    assert near < far / 4
    assert near < 0.05


def test_the_loss_of_the_consistency_function_of_normal_images():
    """With unit vectors of signal and noise at an angle d, the error has the variance 2 s^2 (1 - cos d)."""
    chain, std = CHAINS[0], 0.5
    draw = torch.Generator().manual_seed(0)
    eps, noise = torch.randn(2, 3, 1, 500, 500, generator=draw)
    t = torch.tensor([300, 600, 900])
    estimate = lambda x, t: gaussian_flow(x.double(), chain.alpha_bar(t.long()), 0.0, std).float()  # noqa: E731
    losses = ConsistencyObjective(chain, stages=4)(Denoiser(estimate), std * noise, t, eps)
    r = earlier_timestep(sigmas(chain), t, 4)
    angle = (sigma(chain, t) / std).atan() - (sigma(chain, r) / std).atan()
    error = (2 * std**2 * (1 - angle.cos()) + HUBER**2).sqrt() - HUBER
    expected = error * (1 + 1 / sigma(chain, t))
    torch.testing.assert_close(losses.double(), expected, rtol=0.03, atol=0)


def test_errors_are_weighed_by_one_over_the_noise_and_one_more(batch):
    x0, t, eps = batch
    network = Denoiser(lambda x, t: (t / 1000).float().expand_as(x))
    losses = ConsistencyObjective(CHAINS[0], stages=5)(network, x0, t, eps, False, 0.5)  # the third of five stages
    r = earlier_timestep(sigmas(CHAINS[0]), t, 3)
    target = torch.where((r < 0).view(-1, 1, 1, 1), x0, (r / 1000).view(-1, 1, 1, 1))
    errors = ((t / 1000).view(-1, 1, 1, 1) - target).square().flatten(1).mean(1)
    errors = (errors + HUBER**2).sqrt() - HUBER
    torch.testing.assert_close(losses, (errors * (1 + 1 / sigma(CHAINS[0], t))).float())
    assert torch.equal(network.seen[0], r.clamp(min=0)) and torch.equal(network.seen[1], t)


def test_the_target_has_no_gradient(batch):
    x0, t, eps = (part[2:] for part in batch)
    slope = torch.tensor(0.7, requires_grad=True)
    objective = ConsistencyObjective(CHAINS[0], stages=9)
    losses = objective(Denoiser(lambda x, t: slope * (t / 1000).float().expand_as(x)), x0, t, eps)
    (gradient,) = torch.autograd.grad(losses.sum(), slope)
    r = earlier_timestep(sigmas(CHAINS[0]), t, 9)
    error, weight = 0.7 * (t - r) / 1000, 1 + 1 / sigma(CHAINS[0], t)
    expected = (error / (error**2 + HUBER**2).sqrt() * t / 1000 * weight).sum()
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=1e-4, atol=0)


def test_both_answers_have_the_same_dropout(batch):
    x0, t, eps = (part[2:] for part in batch)
    objective = ConsistencyObjective(CHAINS[0], stages=9)
    torch.manual_seed(0)
    assert objective(Denoiser(lambda x, t: dropout(torch.ones_like(x))), x0, t, eps).abs().max() == 0


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_outputs_are_compared_as_estimates_of_x0(batch, prediction_type):
    x0, t, eps = (part[2:] for part in batch)
    chain = DDPMScheduler(beta_schedule="cosine", prediction_type=prediction_type)

    def answer(x, t):
        signal = chain.alpha_bar(t.long()).float().sqrt()
        velocity = (signal * x - 0.5) / (1 - signal**2).sqrt()
        return torch.full_like(x, 0.5) if prediction_type == "sample" else velocity

    assert ConsistencyObjective(chain, stages=9)(Denoiser(answer), x0, t, eps).max() < 1e-4


# ---------------------------------------------------------------- guidance


class Teacher(Denoiser):
    """Estimates an image by the class, and another one without a class, which is label 3."""

    def forward(self, x, t, class_labels):
        self.seen.append(class_labels)
        estimate = torch.where(class_labels.view(-1, 1, 1, 1) == 3, -0.2, self.estimate)
        return SimpleNamespace(sample=estimate.expand_as(x))


class Recorder(Denoiser):
    """Remembers the noisy images that it saw."""

    def forward(self, x, t, **conditions):
        self.seen.append(x)
        return SimpleNamespace(sample=self.estimate(x, t))


@pytest.mark.parametrize("guidance", [0.0, 2.5])
@chains
def test_a_guided_target_lies_where_a_step_of_ddim_with_guidance_goes(chain, guidance):
    """The image of the batch is what the teacher estimates from the class, which it is on average."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(chain), 1, 4, 4, generator=draw)
    t, labels = torch.arange(len(chain)), torch.arange(len(chain)) % 3
    network = Recorder(lambda x, t: x)
    ConsistencyObjective(chain, 9, Teacher(x0), 3, guidance)(network, x0, t, eps, False, 0.3, class_labels=labels)
    r = earlier_timestep(sigmas(chain), t, 3)
    x_t, (x_r, seen) = chain.add_noise(x0, eps, t), network.seen
    signal, noise = (part.view(-1, 1, 1, 1).sqrt() for part in (chain.alpha_bar(t), 1 - chain.alpha_bar(t)))
    signal_r, noise_r = (part.view(-1, 1, 1, 1).sqrt() for part in (chain.alpha_bar(r), 1 - chain.alpha_bar(r)))
    guided = -0.2 + guidance * (x0 + 0.2)
    expected = (signal_r * guided + noise_r * (x_t - signal * guided) / noise).float()
    assert torch.equal(seen, x_t)
    torch.testing.assert_close(x_r[r >= 0], expected[r >= 0], rtol=1e-4, atol=1e-4)


def test_where_the_target_is_the_image_it_is_the_guided_one(batch):
    x0, _, eps = batch
    t, labels = torch.tensor([1, 5, 10, 15, 20, 25]), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = ConsistencyObjective(CHAINS[0], 4, Teacher(x0), 3, 3.0)
    network = Denoiser(lambda x, t: -0.2 + 3 * (x0 + 0.2))
    assert objective(network, x0, t, eps, class_labels=labels).max() < 1e-6


def test_images_without_a_class_have_no_guidance(batch):
    x0, t, eps = batch
    objectives = ConsistencyObjective(CHAINS[0]), ConsistencyObjective(CHAINS[0], 4, Teacher(x0), 3, 3.0)
    labels = torch.full((6,), 3)
    losses = [objective(Denoiser(lambda x, t: x), x0, t, eps, class_labels=labels) for objective in objectives]
    torch.testing.assert_close(*losses)


# ---------------------------------------------------------------- runs

TUNED = {"objective": "consistency", "prediction_type": "v_prediction", "num_train_timesteps": 40}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prediction_type": "epsilon"}, "objective='consistency' needs prediction_type v_prediction or sample"),
        ({"variance_type": "learned_range"}, "objective='consistency' trains no variance"),
        ({"unet": NETWORK | {"self_condition": True}}, "needs a network whose unet.self_condition is false"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(recipe, options, sentence):
    with one_sentence(sentence):
        train(recipe(**TUNED | options))


def test_a_student_starts_from_its_teacher_and_predicts_the_same(recipe):
    teacher = train(recipe("teacher", prediction_type="v_prediction", steps=1, sample_every=0))
    options = {"init_from": str(teacher), "steps": 1, "sample_every": 0, "learning_rate": 1e-12}
    student = DDPMPipeline.from_pretrained(train(recipe("student", objective="consistency", **options)))
    assert student.scheduler.config.prediction_type == "v_prediction"
    before = DDPMPipeline.from_pretrained(teacher).unet.state_dict()
    assert_same(student.unet.state_dict(), before, rtol=0, atol=1e-9)


def test_a_teacher_of_noise_has_to_predict_v_first(recipe):
    teacher = train(recipe("teacher", steps=1, sample_every=0))
    student = recipe("student", init_from=str(teacher), objective="consistency", steps=1, sample_every=0)
    with one_sentence("objective='consistency' needs prediction_type v_prediction or sample"):
        train(student)
    assert train(student.replace(prediction_type="v_prediction")).is_dir()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(recipe, precision):
    config = recipe(
        unet=NETWORK | {"dropout": 0.2},
        class_conditional=True,
        gradient_accumulation_steps=2,
        mixed_precision=precision,
        save_every=2,
        holdout=8,
        **TUNED,
    )
    train(config)
    whole = final_state(config)
    entries = Run(config.output_dir).read_metrics()
    assert any("held_out_loss" in entry and math.isfinite(entry["held_out_loss"]) for entry in entries)
    assert Image.open(Run(config.output_dir).grids(6)["average"]).size == (8 * 10, 8 * 3), "1, 2 and 4 steps"
    shutil.rmtree(Run(config.output_dir).checkpoint(6))
    train(config.replace(resume=True))
    assert_same(whole, final_state(config))


GUIDED = {"objective": "consistency", "consistency_guidance": 2.0, "class_conditional": True}


@pytest.fixture
def teacher(recipe):
    return train(recipe("teacher", prediction_type="v_prediction", sample_every=0, class_conditional=True))


@pytest.mark.parametrize("changes", [{"objective": "denoising"}, {"class_conditional": False}, {"init_from": None}])
def test_guidance_needs_classes_and_a_teacher(recipe, changes):
    with one_sentence("consistency_guidance=2.0 needs objective consistency, class_conditional, and init_from"):
        recipe(**GUIDED | {"init_from": "teacher"} | changes)


def test_guidance_needs_a_network_that_is_its_teacher(recipe):
    teacher = train(recipe("teacher", prediction_type="v_prediction", steps=1, sample_every=0))
    with one_sentence("needs a model that the run takes over as it is, but of init_from=", "class_embedding"):
        train(recipe("student", init_from=str(teacher), **GUIDED))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_that_learns_guidance_is_resumed_bit_for_bit_without_its_teacher(recipe, teacher, precision):
    options = GUIDED | {"init_from": str(teacher), "mixed_precision": precision, "save_every": 2, "holdout": 8}
    config = recipe("student", **options)
    before = DDPMPipeline.from_pretrained(teacher).unet.state_dict()
    AcceleratorState._reset_state(reset_partial_state=True)  # the teacher may have another precision
    train(config)
    run, whole = Run(config.output_dir), final_state(config)
    assert_same(load_file(run.teacher), before)
    losses = [entry["held_out_loss"] for entry in run.read_metrics() if "held_out_loss" in entry]
    assert held_out_losses(run, [run.pipeline])[run.pipeline] == pytest.approx(losses[-1], rel=1e-2)
    shutil.rmtree(teacher.parent)
    shutil.rmtree(run.checkpoint(6))
    train(config.replace(resume=True))
    assert_same(whole, final_state(config))
    run.teacher.write_bytes(b"cut")
    with one_sentence("teacher.safetensors, the teacher whose guidance this run learns, cannot be read"):
        train(config.replace(resume=True))


def test_a_run_that_learns_guidance_is_another_and_draws_its_grids_without(recipe, teacher):
    options = GUIDED | {"init_from": str(teacher), "guidance_scale": 3.0, "steps": 2, "save_every": 2}
    guided = recipe("guided", **options)
    plain = recipe("plain", **options | {"consistency_guidance": 1.0})
    for config in (guided, plain):
        train(config)
    assert any((final_state(guided)[name] != weights).any() for name, weights in final_state(plain).items())
    assert guided.grid_guidance == 1.0 and plain.grid_guidance == 3.0
    assert not Run(plain.output_dir).teacher.exists()
    with one_sentence("teacher.safetensors, the teacher whose guidance this run learns, cannot be read"):
        train(plain.replace(resume=True, steps=3, consistency_guidance=2.0))


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_two_processes_are_the_same_run_as_one(recipe, teacher, guided):
    options = GUIDED | {"init_from": str(teacher)} if guided else TUNED
    one, two = recipe("one", **options), recipe("two", **options)
    train(one)
    done = launch(write_config(two), processes=2)
    assert done.returncode == 0, done.stderr
    assert_same(final_state(one), final_state(two), rtol=1e-3, atol=2e-5)


# ---------------------------------------------------------------- the pipeline


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_plain_diffusers_draws_the_same_images_with_one_generator_for_each(recipe, steps, zero_snr):
    folder = train(recipe(unet=STOCK, rescale_betas_zero_snr=zero_snr, sample_every=0, **TUNED))
    pipelines = [cls.from_pretrained(folder) for cls in (DDPMPipeline, diffusers.DDPMPipeline)]
    drawn = []
    for pipeline in pipelines:
        assert type(pipeline.scheduler) is diffusers.LCMScheduler
        pipeline.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
        drawn.append(pipeline(3, seeds, num_inference_steps=steps, output_type="np").images)
    assert (drawn[0] == drawn[1]).all()
    alone = pipelines[0](1, torch.Generator().manual_seed(2), num_inference_steps=steps, output_type="np").images
    torch.testing.assert_close(torch.tensor(alone[0]), torch.tensor(drawn[0][2]), rtol=0, atol=1e-5)


def test_the_boundary_scaling_of_lcm_changes_nothing_in_a_few_steps(recipe):
    """It mixes x_t into the estimate where 10 t is not far above 1/2: at t = 0 fully, at t = 2 by less than 0.001."""
    pipeline = DDPMPipeline.from_pretrained(train(recipe(unet=STOCK, sample_every=0, **TUNED)))
    scheduler = pipeline.scheduler
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == len(scheduler.betas) - 1
        assert all(scheduler.get_scalings_for_boundary_condition_discrete(t)[0] < 1e-3 for t in scheduler.timesteps)
        assert all(scheduler.get_scalings_for_boundary_condition_discrete(t)[1] > 0.999 for t in scheduler.timesteps)


def test_the_card_shows_a_call_of_two_steps(recipe):
    config = recipe(sample_every=0, class_conditional=True, **TUNED)
    card = make_card(Run(config.output_dir), train(config), "org/name").text
    assert card.count("num_inference_steps=2, class_labels=0).images") == 2
    assert "DDIMScheduler" not in card and "guidance_scale=2" not in card
