"""One dataclass from file and flags."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from ddpm_pipe.config import Config, JsonDict, parse_config, save_config
from ddpm_pipe.evaluation.evaluate import EvaluateConfig
from ddpm_pipe.sampling.generate import GenerateConfig
from ddpm_pipe.sharing.convert.config import ConvertConfig
from ddpm_pipe.sharing.push import PushConfig
from ddpm_pipe.training.posthoc import PosthocConfig
from ddpm_pipe.training.recipe import TrainConfig


def parse(*argv: str, **defaults) -> TrainConfig:
    return parse_config(TrainConfig, argv, **defaults)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("data: from-file\nsteps: 7\nseed: 5\n")
    config = parse(str(tmp_path / "c.yaml"), "--steps", "9", data="default", batch_size=12)
    assert (config.data, config.steps, config.seed, config.batch_size) == ("from-file", 9, 5, 12)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_saved_is_read_back(tmp_path, suffix):
    unet = {"_class_name": "UNet2DModel", "block_out_channels": [8, 16]}
    config = parse(
        "--data", "x", "--unet", json.dumps(unet), "--resolution", "8", "12", "--learning_rate", "3e-5", "--flip"
    )
    save_config(config, tmp_path / f"c.{suffix}")
    assert parse(str(tmp_path / f"c.{suffix}")) == config
    assert config.unet == unet and isinstance(config.unet, JsonDict)
    assert yaml.safe_load((tmp_path / f"c.{suffix}").read_text()).keys() == {
        f.name for f in dataclasses.fields(TrainConfig)
    }


def test_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("data: x\nlearning_rate: 1e-4\n")  # a string to YAML 1.1
    assert parse(str(tmp_path / "c.yaml")).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "argv", "sentence"),
    [
        ("data: x\nlerning_rate: 1", [], "unknown keys: lerning_rate; known are data, "),
        ("- a list", [], "must hold keys and values"),
        ("data: [", [], "not valid YAML or JSON: [^\\n]*$"),
        ("data: 2024-02-30", [], "not valid YAML or JSON: day is out of range for month"),
        ("1: 2", [], "unknown keys: 1; known are data, "),
        ("data: x", ["--steps"], "argument --steps: expected one argument"),
        ("data: x", ["--lerning_rate", "1"], "unknown arguments: --lerning_rate 1; known are --data"),
        ("data: x", ["--step", "1"], "unknown arguments: --step 1"),
        ("data: x", ["--steps", "0"], "steps=0 must be at least 1"),
        ("data: x", ["--sample_steps", "1001"], r"sample_steps=1001 is more than num_train_timesteps=1000"),
        ("data: x", ["--lr_schedule", "step"], "lr_schedule='step' is unknown; use one of constant, linear, cosine"),
        ("data: x", ["--mixed_precision", "fp8"], "mixed_precision='fp8' is unknown"),
        ("data: x", ["--tracker", "comet"], "tracker='comet' is unknown"),
        ("data: x", ["--class_dropout", "1"], r"class_dropout=1.0 must lie in \[0, 1\)"),
        ("data: x", ["--rescale_betas_zero_snr"], "rescale_betas_zero_snr needs prediction_type"),
        ("data: x", ["--resume", "--overwrite"], "resume and overwrite contradict"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, text, argv, sentence):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        parse(str(tmp_path / "c.yaml"), *argv)


RANGES = {
    "be at least 1": {
        "batch_size": 0,
        "ema_snapshot_every": 0,
        "gradient_accumulation_steps": -1,
        "keep_last": 0,
        "log_every": 0,
        "max_bad_steps": 0,
        "num_samples": 0,
        "num_train_timesteps": 0,
        "sample_steps": 0,
        "save_every": 0,
        "steps": -5,
    },
    "be at least 0": {
        "holdout": -1,
        "keep_every": -1,
        "lr_warmup_steps": -1,
        "max_grad_norm": -1.0,
        "offset_noise": -0.1,
        "push_every": -1,
        "sample_every": -1,
        "seed": -1,
        "vlb_weight": -1e-3,
        "weight_decay": -0.1,
    },
    "be more than 0": {"adam_eps": 0.0, "ema_power": -1.0, "learning_rate": 0.0, "loss_gamma": 0.0, "loss_k": 0.0},
    r"lie in \[0, 1\)": {"adam_beta1": 1.0, "adam_beta2": -0.1, "class_dropout": 1.0, "ema_decay": 1.5},
}


@pytest.mark.parametrize(
    ("name", "value", "words"), [(*each, words) for words, values in RANGES.items() for each in values.items()]
)
def test_numbers_that_make_no_sense_are_one_sentence(name, value, words):
    with pytest.raises(ValueError, match=f"^{name}={value} must {words}.$"):
        TrainConfig(data="x", **{name: value})


def test_an_empty_output_dir_is_one_sentence():
    with pytest.raises(ValueError, match=r"^output_dir='' must name a folder\.$"):
        TrainConfig(data="x", output_dir="")


# ---------------------------------------------------------------- types: of files, flags and Python alike

WRONG = [
    (TrainConfig, "steps", 10.5, "a whole number"),
    (TrainConfig, "steps", "ten", "a whole number"),
    (TrainConfig, "steps", None, "a whole number"),
    (TrainConfig, "steps", True, "a whole number"),
    (TrainConfig, "steps", [10], "a whole number"),
    (TrainConfig, "learning_rate", "fast", "a finite number"),
    (TrainConfig, "learning_rate", float("nan"), "a finite number"),
    (TrainConfig, "learning_rate", float("inf"), "a finite number"),
    (TrainConfig, "learning_rate", False, "a finite number"),
    (TrainConfig, "learning_rate", {"peak": 1}, "a finite number"),
    (TrainConfig, "flip", 1, "true or false"),
    (TrainConfig, "flip", "maybe", "true or false"),
    (TrainConfig, "channels_last", 0, "true or false or null"),
    (TrainConfig, "data", ["a", "b"], "a text"),
    (TrainConfig, "data", 1.5, "a text"),
    (TrainConfig, "push_to", True, "a text or null"),
    (TrainConfig, "resolution", 16.5, "a list of whole numbers or null"),
    (TrainConfig, "resolution", ["a"], "a list of whole numbers or null"),
    (TrainConfig, "ema_sigma_rel", None, "a list of finite numbers"),
    (TrainConfig, "unet", 3, "a mapping, on the command line as JSON"),
    (TrainConfig, "unet", None, "a mapping, on the command line as JSON"),
    (TrainConfig, "unet", "{", "a mapping, on the command line as JSON"),
    (GenerateConfig, "seeds", [1, 2], "a text"),
    (GenerateConfig, "eta", None, "a finite number"),
    (EvaluateConfig, "num_images", 1.5, "a whole number"),
    (EvaluateConfig, "sweep", {"steps": 10}, "a list of texts"),
    (PushConfig, "public", 2, "true or false"),
    (ConvertConfig, "image_size", "big", "a list of whole numbers or null"),
    (PosthocConfig, "step", 1.5, "a whole number or null"),
]
NEEDED = {
    TrainConfig: {"data": "x"},
    GenerateConfig: {"model": "x"},
    EvaluateConfig: {"model": "x", "data": "x"},
    PushConfig: {"run": "x", "repo": "x/y"},
    ConvertConfig: {"source": "x", "output_dir": "y"},
    PosthocConfig: {"run": "x", "sigma_rel": "0.1"},
}


def make(config_class: type[Config], way: str, name: str, value, folder) -> Config:
    """A config with one value given in Python, in a file or by a flag."""
    values = NEEDED[config_class] | {name: value}
    if way == "python":
        return config_class(**values)
    if way == "flag":
        return parse_config(config_class, [f"--{name}", str(value)], **NEEDED[config_class])
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return parse_config(config_class, [str(folder / "c.yaml")])


@pytest.mark.parametrize("way", ["python", "file"])
@pytest.mark.parametrize(("config_class", "name", "value", "kind"), WRONG)
def test_a_value_of_another_type_is_one_sentence(tmp_path, way, config_class, name, value, kind):
    with pytest.raises(ValueError) as error:
        make(config_class, way, name, value, tmp_path)
    assert str(error.value) == f"{name}={value!r} must be {kind}."


@pytest.mark.parametrize(("config_class", "name", "value", "kind"), [row for row in WRONG if isinstance(row[2], str)])
def test_a_flag_of_another_type_is_the_same_sentence(tmp_path, config_class, name, value, kind):
    with pytest.raises(ValueError) as error:
        make(config_class, "flag", name, value, tmp_path)
    given = [value] if kind.startswith("a list") else value
    assert str(error.value) == f"{name}={given!r} must be {kind}."


@pytest.mark.parametrize("way", ["python", "file", "flag"])
@pytest.mark.parametrize(
    ("config_class", "name", "value", "expected"),
    [
        (TrainConfig, "resolution", 64, [64]),
        (TrainConfig, "ema_sigma_rel", 0.1, [0.1]),
        (TrainConfig, "learning_rate", 1, 1.0),
        (TrainConfig, "steps", "10", 10),
        (TrainConfig, "flip", "yes", True),
        (TrainConfig, "channels_last", "false", False),
        (TrainConfig, "label_column", "null", "null"),
        (GenerateConfig, "seeds", 5, "5"),
        (GenerateConfig, "class_labels", 3, "3"),
        (EvaluateConfig, "sweep", "steps=10,20", ["steps=10,20"]),
        (ConvertConfig, "image_size", 32, [32]),
        (PosthocConfig, "sigma_rel", "0.05,0.10", "0.05,0.10"),
    ],
)
def test_a_value_that_can_be_meant_is_taken(tmp_path, way, config_class, name, value, expected):
    taken = getattr(make(config_class, way, name, value, tmp_path), name)
    assert (taken, type(taken)) == (expected, type(expected))


def test_python_may_pass_paths_tuples_and_numbers_of_numpy(tmp_path):
    config = TrainConfig(data=tmp_path, resolution=(8, 12), steps=np.int64(7), learning_rate=np.float32(0.5))
    assert (config.data, config.resolution, config.steps, config.learning_rate) == (str(tmp_path), [8, 12], 7, 0.5)
    save_config(config, tmp_path / "c.yaml")
    assert parse(str(tmp_path / "c.yaml")) == config


@pytest.mark.parametrize("value", [0.1, "0.1"])
def test_a_width_may_be_a_number_in_a_file(tmp_path, value):
    assert make(PosthocConfig, "file", "sigma_rel", value, tmp_path).widths() == [0.1]


def test_missing_file_is_one_sentence():
    with pytest.raises(ValueError, match=r"'nowhere.yaml' cannot be read: No such file"):
        parse("nowhere.yaml")


def test_the_command_line_ends_in_the_sentence_and_code_2(repo):
    command = [sys.executable, "examples/train.py", "--no_such_flag"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: unknown arguments: --no_such_flag")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("preset", ["cifar10", "flowers", "fashion_mnist"])
def test_presets_are_valid(repo, preset):
    parse(str(repo / "examples" / "presets" / f"{preset}.yaml"), data="x")
