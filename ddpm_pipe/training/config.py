"""Every setting of a training run. The defaults are a recipe for small images; the presets hold other recipes."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ddpm_pipe.config import (
    CompileMode,
    Config,
    Float,
    JsonDict,
    Listed,
    NonNegativeFloat,
    NonNegativeInt,
    Place,
    PositiveFloat,
    PositiveInt,
    Share,
    Size,
)
from ddpm_pipe.training.budget import LENGTHS, Budget
from ddpm_pipe.training.sizing import SIZED


def _budget(value: str) -> str:
    try:
        Budget.parse(value)
    except ValueError as error:
        told = "Input should be a time such as 90s, 30min, 2h or 1d, or images such as 200kimg or 5Mimg"
        raise PydanticCustomError("budget", told) from error
    return value


Width = Annotated[Float, Field(gt=0, le=12**-0.5)]
"""sigma_rel of a power-function average; 1 / sqrt(12) weights all steps alike."""


class DataConfig(Config):
    """Images to train on"""

    data: Place
    """a folder of images, a parquet or arrow file, or the id of a dataset on the Hub"""
    split: str = "train"
    """split of the data to train on"""
    image_column: str | None = None
    """column of the images; detected where only one column holds images"""
    label_column: str | None = None
    """column of the classes; detected where only one column holds labels"""
    resolution: Size | None = None
    """size, or height and width, to which images are resized and cropped"""
    channels: PositiveInt | None = None
    """1 (grey), 3 (RGB) or 4 (RGBA)"""
    flip: bool = False
    """mirror images at random"""
    class_conditional: bool = False
    """train a network conditioned on the class labels"""
    class_dropout: Share = 0.1
    """probability of hiding a label, for classifier-free guidance"""
    streaming: bool = False
    """read the data as they are needed instead of decoding them first"""
    holdout: NonNegativeInt = 0
    """images kept out of training, on which the loss is measured"""


class ModelConfig(Config):
    """Network and noise"""

    init_from: Place | None = None
    """start from the weights of a model: the folder of a pipeline or run, or an id on the Hub; what no flag, file or
    preset gives of network and noise is taken over from it, also each key of unet by itself"""
    unet: JsonDict = {}
    """the network: _class_name (DDPMUNet2DModel or UNet2DModel) and its config keys, as JSON"""
    num_train_timesteps: PositiveInt = 1000
    """T, the length of the chain"""
    beta_schedule: str = "linear"
    """linear, linear_rescaled, scaled_linear, squaredcos_cap_v2 (or cosine), sigmoid, sigmoid_alpha_bar or laplace"""
    beta_start: Float = 1e-4
    """first beta, for the schedules that have a range"""
    beta_end: Float = 0.02
    """last beta, for the schedules that have a range"""
    rescale_betas_zero_snr: bool = False
    """rescale betas to zero terminal SNR"""
    prediction_type: str = "epsilon"
    """what the network predicts: epsilon, sample or v_prediction"""
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """variance of the sampler; learned_range trains it with the hybrid loss"""


class LossConfig(Config):
    """Loss"""

    objective: Literal["denoising", "consistency"] = "denoising"
    """denoising, or consistency, which tunes a trained model to draw in 1 to 4 steps; loss, its weights and vlb_weight
    are of denoising alone"""
    consistency_stages: PositiveInt = 4
    """how often the two timesteps that consistency compares come closer in a run"""
    consistency_guidance: Float = 1.0
    """scale of the classifier-free guidance of the model of init_from that its student learns, so that each class is
    drawn guided without a second call of the network; 1 is none"""
    loss: str = "l2"
    """how an error is measured: l1, l2 or huber"""
    loss_weight: str = "none"
    """how noise levels are weighted: none, p2 or min_snr"""
    loss_gamma: PositiveFloat | None = None
    """exponent of p2 or ceiling of min_snr; the value of the paper, 1 or 5, if not given"""
    loss_k: PositiveFloat | None = None
    """k of p2; 1 if not given"""
    vlb_weight: NonNegativeFloat = 1e-3
    """weight of the variational bound with learned variance"""
    offset_noise: NonNegativeFloat = 0.0
    """standard deviation of noise that is the same for all pixels of a channel"""
    timestep_sampling: str = "uniform"
    """how timesteps are drawn: uniform or loss_second_moment"""


class OptimConfig(Config):
    """Optimisation"""

    steps: PositiveInt = 100_000
    """optimizer steps"""
    budget: Annotated[str, AfterValidator(_budget)] | None = None
    """time to train (90s, 30min, 2h, 1d) or images to show (200kimg, 5Mimg), instead of steps; the lengths that are not
    given follow from it, and without a network the whole recipe"""
    batch_size: PositiveInt = 64
    """images per optimizer step, over all processes and accumulation steps"""
    gradient_accumulation_steps: PositiveInt = 1
    """parts into which each process cuts its share of the batch to save memory"""
    learning_rate: PositiveFloat = 2e-4
    """peak learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "constant"
    """learning rate after the warm-up; linear and cosine decay to 0, and warmup_stable_decay does so at the end"""
    lr_cooldown: Share = 0.2
    """share of the steps over which warmup_stable_decay decays; a longer run goes on from the step before"""
    lr_warmup_steps: NonNegativeInt = 0
    """optimizer steps over which the learning rate grows to its peak"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the filters of all convolutions but the first and the last, with AdamW for the rest"""
    muon_rms: PositiveFloat = 0.2
    """Muon: root mean square of a step of a filter, in learning rates"""
    adam_beta1: Share = 0.9
    """AdamW: decay of the first moment"""
    adam_beta2: Share = 0.999
    """AdamW: decay of the second moment"""
    adam_eps: PositiveFloat = 1e-8
    """AdamW: epsilon"""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW: weight decay"""
    max_grad_norm: NonNegativeFloat = 1.0
    """norm to which larger gradients are scaled down; 0 leaves them as they are"""
    max_bad_steps: PositiveInt = 20
    """consecutive steps without a finite gradient after which the run stops"""
    ema_decay: Share = 0.9999
    """longest decay of the averaged weights"""
    ema_power: PositiveFloat = 2 / 3
    """how fast the decay grows to ema_decay: 1 - (1 + step)^-power"""
    ema_sigma_rel: Listed[Width] = []
    """widths of at least two power-function averages, whose snapshots let `ddpm-pipe average` build any other width"""
    ema_snapshot_every: PositiveInt | None = None
    """optimizer steps between the snapshots of ema_sigma_rel; save_every if not given"""
    seed: NonNegativeInt = 0
    """seed of the whole run"""


class MachineConfig(Config):
    """Machine"""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """precision of the network; auto takes that of the launcher, or bf16 where the device supports it"""
    channels_last: bool | None = None
    """keep images channels-last in memory; chosen on CUDA if not given"""
    gradient_checkpointing: bool = False
    """save memory by computing activations twice"""
    compile: CompileMode = "none"
    """mode in which torch.compile compiles the network; the last two use CUDA graphs"""
    deterministic: bool = False
    """use deterministic algorithms on CUDA, which are slower, so that a resumed run is bit-identical there too"""


class OutputConfig(Config):
    """What is written"""

    output_dir: Place = "runs/default"
    """run folder: checkpoints, samples, logs and the finished pipeline"""
    save_every: PositiveInt = 5_000
    """optimizer steps between checkpoints"""
    keep_last: PositiveInt = 2
    """newest checkpoints to keep"""
    keep_every: NonNegativeInt = 0
    """also keep checkpoints at multiples of this step; 0 for none"""
    sample_every: NonNegativeInt = 5_000
    """optimizer steps between sample grids; 0 for none"""
    num_samples: PositiveInt = 64
    """images in a grid"""
    sample_steps: PositiveInt = 50
    """DDIM steps of a grid"""
    guidance_scale: Float = 1.0
    """classifier-free guidance of a grid"""
    log_every: PositiveInt = 20
    """optimizer steps between log entries"""
    tracker: Literal["auto", "none", "tensorboard", "wandb", "trackio"] = "auto"
    """where the log and the grids go besides the run folder; auto means tensorboard where it is installed"""
    push_to: str | None = None
    """repository on the Hub, org/name, to push to every push_every steps"""
    push_every: NonNegativeInt = 0
    """optimizer steps between pushes, a multiple of save_every; 0 for none"""
    push_public: bool = False
    """make the pushed repository public; it is private otherwise"""
    resume: bool = False
    """resume from the newest checkpoint of output_dir"""
    overwrite: bool = False
    """delete the run in output_dir before training"""
    plan: bool = False
    """print the plan, measured by a few steps, and stop before training; nothing is written"""


class TrainConfig(DataConfig, ModelConfig, LossConfig, OptimConfig, MachineConfig, OutputConfig):
    """Every choice of a run"""

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken_over = ModelConfig.model_fields.keys() - self.model_fields_set if self.init_from is not None else set()
        if self.sample_steps > self.num_train_timesteps and "num_train_timesteps" not in taken_over:
            raise ValueError(
                f"sample_steps={self.sample_steps} is more than num_train_timesteps={self.num_train_timesteps}."
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon" and "prediction_type" not in taken_over:
            raise ValueError(
                "rescale_betas_zero_snr needs prediction_type sample or v_prediction: noise alone shows no image."
            )
        if self.push_every % self.save_every or (self.push_every > 0) != (self.push_to is not None):
            raise ValueError(
                f"push_every={self.push_every} must be a multiple of save_every={self.save_every}, and goes with "
                "push_to, the repository on the Hub."
            )
        if self.deterministic and self.compile != "none":
            raise ValueError(
                f"deterministic and compile={self.compile!r} contradict each other, because some compiled kernels are "
                "chosen by their speed; choose one."
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other; choose one.")
        if self.budget is not None and "steps" in self.model_fields_set:
            raise ValueError(f"budget={self.budget!r} and steps={self.steps} contradict each other; give one of them.")
        if self.objective == "consistency" and self.unet.get("self_condition"):
            raise ValueError("objective='consistency' needs a network whose unet.self_condition is false.")
        if self.consistency_guidance != 1 and not (
            self.objective == "consistency" and self.class_conditional and self.init_from is not None
        ):
            raise ValueError(
                f"consistency_guidance={self.consistency_guidance} needs objective consistency, class_conditional, and "
                "init_from, the model whose guidance is learned."
            )
        return self

    @property
    def grid_guidance(self) -> float:
        """Guidance of the sample grids: none where the network itself has learned to draw guided images."""
        return self.guidance_scale if self.consistency_guidance == 1 else 1.0

    def undecided(self) -> set[str]:
        """Return the keys that were not given and follow from the budget; without a network, the recipe as well.

        Where a run is pushed every push_every steps, save_every divides that and does not follow from the budget.
        """
        if self.budget is None:
            return set()
        recipe = set() if "unet" in self.model_fields_set else SIZED
        fixed = {"save_every"} if self.push_every else set()
        return set((LENGTHS | recipe) - self.model_fields_set - fixed)

    @classmethod
    def merge(cls, values: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
        """Return the values of a file and of the flags, which win.

        A budget on the command line takes the place of the steps of a file and of all that suits their number.
        """
        replaced = {"budget"} if "steps" in flags else LENGTHS if "budget" in flags and "steps" in values else set()
        return {name: value for name, value in values.items() if name not in replaced} | flags

    def is_due(self, step: int, every: int) -> bool:
        """Return whether a task is due after `step` steps: at multiples of `every` and at the end, or never for 0."""
        return every > 0 and (step % every == 0 or step == self.steps)


class AverageConfig(Config):
    """Averages to rebuild"""

    run: Place
    """the run folder"""
    sigma_rel: Annotated[Listed[Width], Field(min_length=1)]
    """widths of the averages relative to the run, separated by commas: 0.05,0.10"""
    step: PositiveInt | None = None
    """step at which the averages end; that of the last snapshot if not given"""
