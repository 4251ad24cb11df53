"""One dataclass from file and flags."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from ddpm_pipe.config import JsonDict, parse_config, save_config
from ddpm_pipe.recipe import TrainConfig


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
        ("data: [", [], "not valid YAML or JSON"),
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
