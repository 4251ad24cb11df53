"""The network of the reference implementation, denoising-diffusion-mindspore, with the interface of UNet2DModel.

This file needs only torch and diffusers, since it travels with shared checkpoints. Read it from the bottom up:
`DDPMUNet2DModel`, its down, middle and up levels, then the blocks that these are made of. Feature maps are
(B, C, H, W), and the time embedding `temb` is (B, D).
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

CODE_FILE = "ddpm_unet"
"""The name of this file, without suffix, beside a saved network."""

# ---------------------------------------------------------------- time


class SinusoidalEmbedding(nn.Module):
    """Embed timesteps (B,) in (B, dim): fixed sines, then cosines, of geometrically spaced frequencies.

    The source is Vaswani et al. (2017), and DDPM, appendix B.
    """

    def __init__(self, dim: int, theta: float = 10_000.0):
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        index = torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(index * (-math.log(self.theta) / (half - 1)))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """Embed timesteps (B,) in (B, dim + 1): t itself, then sines and cosines of frequencies drawn from a Gaussian.

    The frequencies are learned or stay random.
    """

    def __init__(self, dim: int, learned: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim // 2), requires_grad=learned)
        self.dim = dim + 1

    def forward(self, timestep: Tensor) -> Tensor:
        t = timestep.float()[:, None]
        angle = t * self.weight.float() * (2 * math.pi)
        return torch.cat([t, angle.sin(), angle.cos()], dim=1)


TIME_EMBEDDINGS: dict[str, Callable[[int, float], SinusoidalEmbedding | FourierEmbedding]] = {
    "positional": SinusoidalEmbedding,
    "learned_fourier": lambda dim, theta: FourierEmbedding(dim, learned=True),
    "random_fourier": lambda dim, theta: FourierEmbedding(dim, learned=False),
}
"""(width, theta) -> the embedding of timesteps (B,), before the MLP."""


class TimeMLP(nn.Module):
    """Apply Linear, exact GELU and Linear to the embedded timestep, (B, in_dim) -> (B, dim)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, embedded: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(embedded)))


# ---------------------------------------------------------------- norms


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel, with a gain and no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, eps=1e-5).permute(0, 3, 1, 2)
        return normed.contiguous() if x.is_contiguous() else normed


class ChannelRMSNorm(nn.Module):
    """Divide the channels of each pixel by their root mean square, with a gain (Zhang & Sennrich 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.weight * x.shape[1] ** 0.5)[:, None, None]


RESNET_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "group": nn.GroupNorm,
    "rms": lambda groups, channels: ChannelRMSNorm(channels),
}
"""(groups, channels) -> the norm after each convolution of a ResNet block."""

ATTENTION_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": ChannelLayerNorm, "rms": ChannelRMSNorm}


# ---------------------------------------------------------------- convolution blocks


class WeightStandardizedConv2d(nn.Conv2d):
    """A convolution whose filters are brought to zero mean and unit variance (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        # a LayerNorm without gain does just this to each filter, in one kernel and with sums in float32
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-5)
        return self._conv_forward(x, weight, self.bias)


class ResnetBlock(nn.Module):
    """Apply convolution, norm and SiLU twice and add a skip; the timestep scales and shifts after the first norm."""

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        temb_dim: int,
        norm: Callable[[int], nn.Module],
        dropout: float,
        standardize: bool,
    ):
        super().__init__()
        conv = WeightStandardizedConv2d if standardize else nn.Conv2d
        self.time_emb_proj = nn.Linear(temb_dim, 2 * out_ch)
        self.conv1 = conv(in_ch, out_ch, 3, padding=1)
        self.norm1 = norm(out_ch)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_ch, out_ch, 3, padding=1)
        self.norm2 = norm(out_ch)
        self.conv_shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        h = F.silu(self.norm2(self.conv2(self.dropout(h))))
        return h + self.conv_shortcut(x)


class PixelUnshuffleConv2d(nn.Conv2d):
    """Halve the resolution by moving each 2x2 square of pixels into the channels, then apply a 1x1 convolution.

    The last row or column of an odd size is dropped.
    """

    def __init__(self, in_ch: int, out_ch: int):
        super().__init__(4 * in_ch, out_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (size - size % 2 for size in x.shape[-2:])
        return super().forward(F.pixel_unshuffle(x[..., :height, :width], 2))


DOWNSAMPLES: dict[str, Callable[[int, int], nn.Module]] = {
    "conv": lambda in_ch, out_ch: nn.Conv2d(in_ch, out_ch, 4, 2, 1),
    "pixel_unshuffle": PixelUnshuffleConv2d,
}


# ---------------------------------------------------------------- attention


def _with_memory(k: Tensor, v: Tensor, mem_kv: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """Put learned keys and values, the same for all images, before those of the pixels (B, heads, ...) along `dim`."""
    if mem_kv is None:
        return k, v
    mem_k, mem_v = mem_kv.unsqueeze(1).expand(-1, k.shape[0], -1, -1, -1)  # len(k) would fix B in an export
    return torch.cat([mem_k, k], dim), torch.cat([mem_v, v], dim)


class FullAttention(nn.Module):
    """Softmax attention between all pixels: its cost grows with the square of H * W."""

    def __init__(self, channels: int, heads: int, head_dim: int, num_mem_kv: int = 0):
        super().__init__()
        self.heads = heads
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, head_dim)) if num_mem_kv else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        qkv = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).flatten(-2).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, H * W, head_dim)
        k, v = _with_memory(k, v, self.mem_kv, dim=-2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(-1, -2).flatten(1, 2).unflatten(-1, (height, width)))


class LinearAttention(nn.Module):
    """Attention with separate softmaxes of queries and keys (Shen et al. 2021): its cost grows with H * W.

    The values are divided by H * W unless `mean` is False.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        num_mem_kv: int = 0,
        norm: Callable[[int], nn.Module] = ChannelLayerNorm,
        mean: bool = True,
    ):
        super().__init__()
        self.heads, self.scale, self.mean = heads, head_dim**-0.5, mean
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head_dim, num_mem_kv)) if num_mem_kv else None
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_dim, channels, 1)
        self.norm_out = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).flatten(-2).unbind(1)  # (B, heads, head_dim, H * W)
        k, v = _with_memory(k, v, self.mem_kv, dim=-1)
        q, k = q.softmax(dim=-2), k.softmax(dim=-1)
        # the constants that scale q and v multiply the small product of v and k instead
        context = v @ k.transpose(-1, -2) * (self.scale / (height * width) if self.mean else self.scale)
        out = (context @ q).flatten(1, 2).unflatten(-1, (height, width))
        return self.norm_out(self.to_out(out))


class AttentionBlock(nn.Module):
    """Apply a norm and then attention, and add a skip."""

    def __init__(self, attention: nn.Module, norm: nn.Module):
        super().__init__()
        self.norm = norm
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearAttention,
    "linear_sum": partial(LinearAttention, mean=False),
    "full": lambda channels, heads, head_dim, num_mem_kv, norm: FullAttention(channels, heads, head_dim, num_mem_kv),
}
"""(channels, heads, head_dim, num_mem_kv, norm) -> attention of images (B, C, H, W)."""


# ---------------------------------------------------------------- levels


class DownLevel(nn.Module):
    """Apply ResNet blocks and attention, then halve the resolution; return also the activation after each block."""

    def __init__(self, resnets: Sequence[nn.Module], attention: nn.Module, downsample: nn.Module):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attention = attention
        self.downsample = downsample

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for resnet in self.resnets:
            x = resnet(x, temb)
            skips.append(x)
        skips[-1] = x = self.attention(x)
        return self.downsample(x), skips


class UpLevel(nn.Module):
    """Apply ResNet blocks, each of which is fed one stored activation, and attention; then double the resolution."""

    def __init__(self, resnets: Sequence[nn.Module], attention: nn.Module, in_ch: int, out_ch: int):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attention = attention
        self.upsample = nn.Conv2d(in_ch, out_ch, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor, skips: list[Tensor], size: torch.Size) -> Tensor:
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            x = resnet(torch.cat([x, skip], dim=1), temb)
        x = self.attention(x)
        if x.shape[-2:] != size:  # the way down rounds odd sizes down, so `size` is the exact one
            x = F.interpolate(x, size=size, mode="nearest")
        return self.upsample(x)


# ---------------------------------------------------------------- the network


class DDPMUNet2DModel(ModelMixin, ConfigMixin):
    """The UNet of the reference implementation: the network of DDPM with linear attention at every level.

    Args:
        sample_size: height and width of the images, an int or (height, width); any size of at least
            2 ** (levels - 1) works, odd ones too.
        in_channels, out_channels: channels of the noisy image and of the output; with learned variance the output has
            twice the channels of the image.
        block_out_channels: channels after each level; its length is the number of resolutions.
        stem_channels: channels of the first convolution and of the last block; None is block_out_channels[0].
        layers_per_block: ResNet blocks per level, on the way down and again on the way up.
        norm_type: norm of the ResNet blocks, "group" or "rms" (over the channels of each pixel).
        norm_num_groups: groups of each GroupNorm; must divide every width.
        downsample_type: "conv" (4x4, stride 2) or "pixel_unshuffle" (2x2 squares into channels, then 1x1).
        attention_types: per level "linear", "linear_sum" (linear, but values are not divided by the number of pixels),
            "full" or "none"; one value for all, or one per level from the highest resolution down.
        mid_attention_type: the attention of the middle, one of the same values.
        attention_norm_type: norm before each attention and after linear ones, "layer" or "rms".
        num_attention_heads, attention_head_dim: number of heads of each attention, and channels of each head; one value
            for all, or one per level, of which the middle takes the last.
        num_mem_kv: number of learned keys and values that each attention has beside those of the pixels.
        time_embedding_dim: width of the sinusoidal embedding of the timestep; the output of the time MLP is four times
            as wide, also with Fourier features. None is stem_channels.
        time_embedding_type: "positional" (sinusoidal), "learned_fourier" or "random_fourier".
        time_fourier_dim: number of sines and cosines of Fourier features together, twice the number of frequencies;
            None is time_embedding_dim.
        time_embedding_theta: base of the sinusoidal embedding; its longest period is 2 pi theta timesteps.
        weight_standardization: whether to standardise the filters of the ResNet blocks.
        dropout: probability in [0, 1), inside each ResNet block.
        num_class_embeds: number of classes; labels are 0 to num_class_embeds - 1 and one more embedding, the null
            class, stands for "no label".
        self_condition: whether to take the last estimate of x0 as additional input (Chen et al. 2023, Analog Bits).

    Raises:
        ValueError: for an unknown value or sizes that cannot work, naming the argument.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        attention_types: str | tuple[str, ...] = "linear",
        mid_attention_type: str = "full",
        num_attention_heads: int | tuple[int, ...] = 4,
        attention_head_dim: int | tuple[int, ...] = 32,
        time_embedding_type: str = "positional",
        weight_standardization: bool = True,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        self_condition: bool = False,
        norm_type: str = "group",
        attention_norm_type: str = "layer",
        num_mem_kv: int = 0,
        downsample_type: str = "conv",
        stem_channels: int | None = None,
        time_embedding_dim: int | None = None,
        time_fourier_dim: int | None = None,
        time_embedding_theta: float = 10_000.0,
    ):
        super().__init__()
        self._check()
        levels = len(block_out_channels)
        kinds = self._per_level("attention_types")
        heads = list(zip(self._per_level("num_attention_heads"), self._per_level("attention_head_dim")))
        width = block_out_channels[0] if stem_channels is None else stem_channels
        time_dim = width if time_embedding_dim is None else time_embedding_dim
        temb_dim = 4 * time_dim
        embedded_dim = time_dim if time_fourier_dim is None else time_fourier_dim
        self.time_proj = TIME_EMBEDDINGS[time_embedding_type](embedded_dim, time_embedding_theta)
        self.time_embedding = TimeMLP(self.time_proj.dim, temb_dim)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds + 1, temb_dim)

        resnet_norm = partial(RESNET_NORMS[norm_type], norm_num_groups)
        attention_norm = ATTENTION_NORMS[attention_norm_type]

        def resnet(in_ch: int, out_ch: int) -> ResnetBlock:
            return ResnetBlock(in_ch, out_ch, temb_dim, resnet_norm, dropout, weight_standardization)

        def attention(kind: str, channels: int, level: int) -> nn.Module:
            if kind == "none":
                return nn.Identity()
            inner = ATTENTIONS[kind](channels, *heads[level], num_mem_kv, attention_norm)
            return AttentionBlock(inner, attention_norm(channels))

        self.conv_in = nn.Conv2d(in_channels * (2 if self_condition else 1), width, 7, padding=3)

        level_in = (width, *block_out_channels[:-1])
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for i, (in_ch, out_ch, kind) in enumerate(zip(level_in, block_out_channels, kinds, strict=True)):
            down = [resnet(in_ch, in_ch) for _ in range(layers_per_block)]
            last = i == levels - 1
            after = nn.Conv2d(in_ch, out_ch, 3, padding=1) if last else DOWNSAMPLES[downsample_type](in_ch, out_ch)
            self.down_blocks.append(DownLevel(down, attention(kind, in_ch, i), after))
            up = [resnet(out_ch + in_ch, out_ch) for _ in range(layers_per_block)]
            self.up_blocks.insert(0, UpLevel(up, attention(kind, out_ch, i), out_ch, in_ch))

        mid = block_out_channels[-1]
        self.mid_resnet_1 = resnet(mid, mid)
        self.mid_attention = attention(mid_attention_type, mid, -1)
        self.mid_resnet_2 = resnet(mid, mid)

        self.resnet_out = resnet(2 * width, width)
        self.conv_out = nn.Conv2d(width, out_channels, 1)
        self.gradient_checkpointing = False

    def _per_level(self, name: str) -> tuple:
        """Return a config value as a tuple of one entry per level."""
        value, levels = self.config[name], len(self.config.block_out_channels)
        if isinstance(value, (str, int)):
            return (value,) * levels
        if len(value) != levels:
            raise ValueError(f"{name} has {len(value)} entries for {levels} levels; give one or {levels}.")
        return tuple(value)

    def _check(self) -> None:
        """Raise ValueError, in one sentence, where the config cannot make a network."""
        config = self.config
        for name, values, accepted in (
            ("time_embedding_type", [config.time_embedding_type], TIME_EMBEDDINGS),
            ("norm_type", [config.norm_type], RESNET_NORMS),
            ("attention_norm_type", [config.attention_norm_type], ATTENTION_NORMS),
            ("downsample_type", [config.downsample_type], DOWNSAMPLES),
            ("attention_types", self._per_level("attention_types"), [*ATTENTIONS, "none"]),
            ("mid_attention_type", [config.mid_attention_type], [*ATTENTIONS, "none"]),
        ):
            for value in values:
                if value not in accepted:
                    raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(accepted)}.")
        self._check_widths()
        for name in ("layers_per_block", "norm_num_groups"):
            if config[name] < 1:
                raise ValueError(f"{name}={config[name]} must be at least 1.")
        for name in ("num_attention_heads", "attention_head_dim"):
            if min(self._per_level(name)) < 1:
                raise ValueError(f"{name}={config[name]} must be at least 1.")
        if config.num_mem_kv < 0:
            raise ValueError(f"num_mem_kv={config.num_mem_kv} must be at least 0.")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout={config.dropout} must lie in [0, 1).")
        if config.sample_size is not None:
            size = config.sample_size
            self._check_size(*((size, size) if isinstance(size, int) else size))

    def _check_widths(self) -> None:
        config = self.config
        if not config.block_out_channels:
            raise ValueError("block_out_channels must name at least one level.")
        stem = config.block_out_channels[0] if config.stem_channels is None else config.stem_channels
        self._check_time(stem)
        if config.norm_type != "group" or config.norm_num_groups < 1:
            return
        for channels in (stem, *config.block_out_channels):
            if channels % config.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups={config.norm_num_groups} must divide stem_channels and block_out_channels, not "
                    f"{channels}."
                )

    def _check_time(self, stem: int) -> None:
        config = self.config
        if config.time_fourier_dim is not None and config.time_embedding_type == "positional":
            raise ValueError(
                f"time_fourier_dim={config.time_fourier_dim} is for time_embedding_type learned_fourier or "
                "random_fourier; a positional one has time_embedding_dim."
            )
        time_dim = stem if config.time_embedding_dim is None else config.time_embedding_dim
        for name, width, least in (
            ("time_fourier_dim", config.time_fourier_dim, 2),
            ("time_embedding_dim, or stem_channels or block_out_channels[0] in its place,", time_dim, 4),
        ):
            if width is not None and (width % 2 or width < least):
                raise ValueError(f"{name} must be even and at least {least}, not {width}.")
        if not 0 < config.time_embedding_theta < math.inf:
            raise ValueError(f"time_embedding_theta={config.time_embedding_theta} must be positive and finite.")

    def _check_size(self, height: int, width: int) -> None:
        levels = len(self.config.block_out_channels)
        if min(height, width) < 2 ** (levels - 1):
            raise ValueError(
                f"images of {height}x{width} are too small for {levels} levels of block_out_channels: "
                f"height and width must be at least {2 ** (levels - 1)}."
            )

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a network from a folder or the Hub, with the keywords of diffusers' models.

        Raises:
            ValueError: for weights that are missing or left over, which diffusers only warns of.
        """
        network, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind, told in (("missing_keys", "lacks the weights"), ("unexpected_keys", "has the unknown weights")):
            if info.get(kind):
                raise ValueError(f"{args[0] if args else 'the folder'} {told} {', '.join(sorted(info[kind]))}.")
        return (network, info) if output_loading_info else network

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        """Split a saved config as diffusers does, without `auto_map`, which is no argument of this class."""
        return super().extract_init_dict({key: config_dict[key] for key in config_dict if key != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Return the config as JSON, and in it where AutoModel finds the code with trust_remote_code=True."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # where it was loaded from is private
        config["auto_map"] = {"AutoModel": f"{CODE_FILE}.{DDPMUNet2DModel.__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Write config.json and, beside it, this file, since a network of this class brings its code."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{CODE_FILE}.py").write_text(Path(__file__).read_text())
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no label"; None for a network without classes."""
        return self.config.num_class_embeds

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        self_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict what the scheduler's `prediction_type` says from a noisy image.

        Args:
            sample: x_t, (B, in_channels, H, W).
            timestep: t, a number or a tensor, 0-d or (B,).
            class_labels: (B,) integers, 0 to num_class_embeds (the null class); None is the null class for all.
            self_cond: the last estimate of x0, shaped like `sample`; None is zeros.
            return_dict: return a `UNet2DOutput` instead of a tuple.

        Returns:
            `sample`, the prediction, (B, out_channels, H, W).

        Raises:
            ValueError: for labels or an estimate that this network has no use for, or images too small for its levels.
        """
        temb = self._embed(timestep, class_labels, sample)
        if self.config.self_condition:
            self_cond = torch.zeros_like(sample) if self_cond is None else self_cond
            sample = torch.cat([self_cond, sample], dim=1)
        elif self_cond is not None:
            raise ValueError("self_cond was given to a network with self_condition=False.")
        self._check_size(*sample.shape[-2:])

        x = stem = self.conv_in(sample)
        skips, sizes = [], []
        for level in self.down_blocks:
            sizes.append(x.shape[-2:])
            x, level_skips = self._run(level, x, temb)
            skips.append(level_skips)

        x = self._run(self.mid_resnet_1, x, temb)
        x = self.mid_attention(x)
        x = self._run(self.mid_resnet_2, x, temb)

        # each level ends at the size of the level above it, and the first at its own
        sizes = [sizes[0], *sizes[:-1]]
        for level, level_skips, size in zip(self.up_blocks, reversed(skips), reversed(sizes), strict=True):
            x = self._run(level, x, temb, level_skips, size)

        x = self.resnet_out(torch.cat([x, stem], dim=1), temb)
        x = self.conv_out(x)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _embed(self, timestep: Tensor | float | int, class_labels: Tensor | None, sample: Tensor) -> Tensor:
        """Return the embedding (B, D) of the timestep and the class, after the SiLU before each block's projection."""
        if not isinstance(timestep, Tensor):  # filled in on the device, where torch.compile keeps it a variable
            timestep = torch.full((), timestep, device=sample.device)
        timestep = timestep.to(sample.device, non_blocking=True).expand(sample.shape[0])
        temb = self.time_embedding(self.time_proj(timestep).to(self.dtype))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to a network without classes (num_class_embeds=None).")
            return F.silu(temb)
        if class_labels is None:
            null_class = self.class_embedding.num_embeddings - 1
            class_labels = torch.full(sample.shape[:1], null_class, device=sample.device)
        return F.silu(temb + self.class_embedding(class_labels))

    def _run(self, block: nn.Module, *args):
        """Run a block; gradient checkpointing recomputes its activations in the backward pass."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
