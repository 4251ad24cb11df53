"""A config from a file and flags, and values that are checked wherever they come from."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import one_sentence

from ddpm_pipe import __version__
from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import Config, make_parser, parse
from ddpm_pipe.convert.config import ConvertConfig
from ddpm_pipe.evaluation.config import EvaluateConfig
from ddpm_pipe.sampling.config import ALIASES, GenerateConfig, TimestepsConfig
from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.training.config import AverageConfig, TrainConfig


def parse_train(*argv: str, **defaults) -> TrainConfig:
    return parse(TrainConfig, argv, **defaults)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("data: from-file\nsteps: 7\nseed: 5\n")
    config = parse_train(str(tmp_path / "c.yaml"), "--steps", "9", data="default", batch_size=12)
    assert (config.data, config.steps, config.seed, config.batch_size) == ("from-file", 9, 5, 12)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_saved_is_read_back(tmp_path, suffix):
    unet = {"_class_name": "UNet2DModel", "block_out_channels": [8, 16]}
    flags = ["--resolution", "8", "12", "--learning-rate", "3e-5", "--flip", "--ema_sigma_rel", "0.05,0.1"]
    config = parse_train("--data", "x", "--unet", json.dumps(unet), *flags)
    values = yaml.safe_load(config.to_yaml())
    (tmp_path / f"c.{suffix}").write_text(json.dumps(values) if suffix == "json" else config.to_yaml())
    assert parse_train(str(tmp_path / f"c.{suffix}")) == config
    assert (config.unet, config.resolution, config.ema_sigma_rel) == (unet, [8, 12], [0.05, 0.1])
    assert list(values) == [name for names in TrainConfig.sections().values() for name in names]
    assert set(values) == set(TrainConfig.model_fields)


def test_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("data: x\nlearning_rate: 1e-4\n")  # a string to YAML 1.1
    assert parse_train(str(tmp_path / "c.yaml")).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "argv", "sentence"),
    [
        ("data: x\nlerning_rate: 1", [], "unknown keys: lerning_rate; known are data, "),
        ("- a list", [], "must hold keys and values"),
        ("data: [", [], "not valid YAML or JSON: "),
        ("data: 2024-02-30", [], "not valid YAML or JSON: day is out of range for month"),
        ("1: 2", [], "unknown keys: 1; known are data, "),
        ("steps: 1", [], "data must be given: a folder of images"),
        ("data: x", ["--steps"], "argument --steps: expected one argument"),
        ("data: x", ["--lerning_rate", "1"], "unknown arguments: --lerning_rate 1; known are --data"),
        ("data: x", ["--step", "1"], "unknown arguments: --step 1"),
        ("data: x", ["--sample_steps", "1001"], "sample_steps=1001 is more than num_train_timesteps=1000"),
        ("data: x", ["--lr_schedule", "step"], "lr_schedule='step' must be 'constant', 'linear', 'cosine' or "),
        ("data: x", ["--rescale_betas_zero_snr"], "rescale_betas_zero_snr needs prediction_type"),
        ("data: x", ["--resume", "--overwrite"], "resume and overwrite contradict"),
        ("data: x", ["--output_dir", ""], "output_dir='' must have at least 1 character"),
    ],
)
def test_bad_config_is_one_sentence(tmp_path, text, argv, sentence):
    (tmp_path / "c.yaml").write_text(text)
    with one_sentence(sentence):
        parse_train(str(tmp_path / "c.yaml"), *argv)


def test_missing_file_is_one_sentence():
    with one_sentence("'nowhere.yaml' cannot be read: No such file"):
        parse_train("nowhere.yaml")


# ---------------------------------------------------------------- values: of files, flags and Python alike

WRONG = [
    (TrainConfig, "steps", 10.5, "be a valid integer"),
    (TrainConfig, "steps", "ten", "be a valid integer"),
    (TrainConfig, "steps", None, "be a valid integer"),
    (TrainConfig, "steps", True, "be a number, not true or false"),
    (TrainConfig, "steps", [10], "be a valid integer"),
    (TrainConfig, "steps", 0, "be greater than or equal to 1"),
    (TrainConfig, "learning_rate", "fast", "be a valid number"),
    (TrainConfig, "learning_rate", float("nan"), "be a finite number"),
    (TrainConfig, "learning_rate", float("inf"), "be a finite number"),
    (TrainConfig, "learning_rate", False, "be a number, not true or false"),
    (TrainConfig, "learning_rate", {"peak": 1}, "be a valid number"),
    (TrainConfig, "learning_rate", 0.0, "be greater than 0"),
    (TrainConfig, "holdout", -1, "be greater than or equal to 0"),
    (TrainConfig, "class_dropout", 1.0, "be less than 1"),
    (TrainConfig, "ema_decay", -0.1, "be greater than or equal to 0"),
    (TrainConfig, "flip", 2, "be a valid boolean"),
    (TrainConfig, "flip", "maybe", "be a valid boolean"),
    (TrainConfig, "data", ["a", "b"], "be a valid string"),
    (TrainConfig, "push_to", True, "be a valid string"),
    (TrainConfig, "unet", 3, "be a valid dictionary"),
    (TrainConfig, "unet", None, "be a valid dictionary"),
    (TrainConfig, "unet", "{", "be a mapping, on the command line as JSON"),
    (TrainConfig, "mixed_precision", "fp8", "be 'auto', 'no', 'bf16' or 'fp16'"),
    (GenerateConfig, "seeds", [1, 2], "be a valid string"),
    (GenerateConfig, "eta", None, "be a valid number"),
    (GenerateConfig, "dtype", "float8", "be 'float32', 'bfloat16' or 'float16'"),
    (EvaluateConfig, "num_images", 1.5, "be a valid integer"),
    (EvaluateConfig, "sweep", {"steps": 10}, "be a valid list"),
    (PushConfig, "public", 2, "be a valid boolean"),
    (AverageConfig, "step", 1.5, "be a valid integer"),
]
WRONG_ENTRIES = [
    (TrainConfig, "resolution", 16.5, 16.5),
    (TrainConfig, "resolution", ["a"], "a"),
    (TrainConfig, "resolution", [8, 0], 0),
    (TrainConfig, "ema_sigma_rel", [0.1, 0.3], 0.3),
    (ConvertConfig, "image_size", "big", "big"),
    (AverageConfig, "sigma_rel", "0.05,wide", "wide"),
]
"""A list with one entry that cannot be, which the sentence shows."""
NEEDED = {
    TrainConfig: {"data": "x"},
    GenerateConfig: {"model": "x"},
    TimestepsConfig: {"model": "x", "steps": 4},
    EvaluateConfig: {"model": "x", "data": "x"},
    PushConfig: {"run": "x", "repo": "x/y"},
    ConvertConfig: {"source": "x", "output_dir": "y"},
    AverageConfig: {"run": "x", "sigma_rel": "0.1"},
}


def make(config_class: type[Config], way: str, name: str, value, folder) -> Config:
    """A config with one value given in Python, in a file or by a flag."""
    values = NEEDED[config_class] | {name: value}
    if way == "python":
        return config_class(**values)
    if way == "flag":
        return parse(config_class, [f"--{name}", str(value)], **NEEDED[config_class])
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return parse(config_class, [str(folder / "c.yaml")])


@pytest.mark.parametrize("way", ["python", "file"])
@pytest.mark.parametrize(("config_class", "name", "value", "words"), WRONG)
def test_a_wrong_value_is_one_sentence(tmp_path, way, config_class, name, value, words):
    with one_sentence(f"{name}={value!r} must {words}"):
        make(config_class, way, name, value, tmp_path)


@pytest.mark.parametrize(("config_class", "name", "value", "entry"), WRONG_ENTRIES)
def test_a_wrong_entry_of_a_list_is_one_sentence(tmp_path, config_class, name, value, entry):
    with one_sentence(f"{name}={entry!r} must be "):
        make(config_class, "file", name, value, tmp_path)


@pytest.mark.parametrize("flag", ["ten", "0"])
def test_a_wrong_flag_is_one_sentence(flag):
    with one_sentence(f"steps={flag!r} must be "):
        parse_train("--data", "x", "--steps", flag)


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
        (AverageConfig, "sigma_rel", "0.05,0.10", [0.05, 0.1]),
        (AverageConfig, "sigma_rel", 0.1, [0.1]),
    ],
)
def test_a_value_that_can_be_meant_is_taken(tmp_path, way, config_class, name, value, expected):
    taken = getattr(make(config_class, way, name, value, tmp_path), name)
    assert (taken, type(taken)) == (expected, type(expected))


def test_python_may_pass_paths_tuples_and_numbers_of_numpy(tmp_path):
    config = TrainConfig(data=tmp_path, resolution=(8, 12), steps=np.int64(7), learning_rate=np.float32(0.5))
    assert (config.data, config.resolution, config.steps, config.learning_rate) == (str(tmp_path), [8, 12], 7, 0.5)


def test_a_config_is_changed_by_making_another_one():
    config = TrainConfig(data="x", steps=10)
    assert config.replace(steps=20) == TrainConfig(data="x", steps=20) and config.steps == 10
    assert config.replace(seed=1).model_fields_set == {"data", "steps", "seed"}
    with one_sentence("steps=0 must be greater than or equal to 1"):
        config.replace(steps=0)
    with pytest.raises(ValueError):
        config.steps = 20


# ---------------------------------------------------------------- what --help says


@pytest.mark.parametrize("config_class", NEEDED)
def test_every_key_has_a_flag_and_a_sentence(config_class):
    told = " ".join(make_parser(config_class).format_help().split())
    for name, field in config_class.model_fields.items():
        assert field.description and f"--{name}" in told, name
        assert field.description.split()[0] in told, name


def test_help_names_what_the_registries_hold():
    from ddpm_pipe.noise import BETA_SCHEDULES
    from ddpm_pipe.objective import LOSSES
    from ddpm_pipe.prediction import LOSS_WEIGHTS, PREDICTIONS
    from ddpm_pipe.training.timestep_sampling import TIMESTEP_SAMPLERS

    registries = {
        "beta_schedule": BETA_SCHEDULES,
        "prediction_type": PREDICTIONS,
        "loss": LOSSES,
        "loss_weight": LOSS_WEIGHTS,
        "timestep_sampling": TIMESTEP_SAMPLERS,
    }
    for name, registry in registries.items():
        told = TrainConfig.model_fields[name].description
        assert all(entry in told for entry in registry), name
    assert all(alias in GenerateConfig.model_fields["scheduler"].description for alias in ALIASES)


# ---------------------------------------------------------------- the commands


def command(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "ddpm_pipe", *argv], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv", [[], ["train", "--help"], ["evaluate", "--help"], ["convert", "--help"]])
def test_help_needs_no_torch(argv):
    code = f"import sys; from ddpm_pipe.cli import main\ntry: main({argv!r})\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'diffusers', 'transformers', 'datasets'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ddpm-pipe" in done.stdout


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train", "--no_such_flag"], "ddpm-pipe train: unknown arguments: --no_such_flag"),
        (["train", "imagenet"], "ddpm-pipe train: 'imagenet' is neither a config file"),
        (["draw"], "ddpm-pipe draw: there is no such command; use one of train, generate"),
        (["generate", "--model", "nowhere"], "ddpm-pipe generate: "),
    ],
)
def test_a_refusal_is_one_line_and_code_2(argv, told):
    done = command(*argv)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(told)


def test_a_bug_keeps_its_traceback(monkeypatch):
    from ddpm_pipe import cli

    monkeypatch.setattr(cli, "run", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["train"])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    parse_train(str(PRESETS[preset]), data="x")


def test_the_version_is_told():
    assert command("--version").stdout.strip() == f"ddpm-pipe {__version__}"
