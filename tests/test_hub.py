"""Sharing a run: what is pushed, its card, and a Hub that fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from runs import REPO, make_recipe, write_config

from ddpm_pipe.card import training_seconds
from ddpm_pipe.config import parse_config
from ddpm_pipe.hub import PushConfig, PushError, stage
from ddpm_pipe.hub import push as share
from ddpm_pipe.recipe import TrainConfig

pytestmark = pytest.mark.xdist_group("hub")

CLASSES = {"class_conditional": True, "holdout": 20, "save_every": 3, "sample_every": 3, "log_every": 2}


@pytest.fixture(scope="module")
def config(lives, few_images, tmp_path_factory) -> TrainConfig:
    """A finished run, with things beside it that are nobody's business."""
    config = make_recipe(tmp_path_factory.mktemp("shared") / "run", data=few_images, **CLASSES)
    lives.complete(write_config(config))
    run = Path(config.output_dir)
    for private in ("token", "pipeline/.env", "pipeline/optimizer.bin", "pipeline/unet/notes.txt", "logs/x.json"):
        (run / private).parent.mkdir(exist_ok=True)
        (run / private).write_text("hf_secret")
    return config


@pytest.fixture
def hub():
    with HubServer(tokens={"hf_good": "org", "hf_other": "stranger"}) as server:
        yield server


@pytest.fixture
def push(hub, config, monkeypatch):
    """examples/push.py in this process, with the settings that another would have from its environment."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts

    def push(*argv: str, token: str = "hf_good") -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        share(parse_config(PushConfig, ["--run", config.output_dir, "--repo", "org/mine", *argv]))

    return push


PUSHED = {
    "README.md",
    "ddpm_pipeline.py",
    "model_index.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/ddpm_unet.py",
    "unet/diffusion_pytorch_model.safetensors",
}

# ---------------------------------------------------------------- what is pushed


def test_only_pipeline_card_and_picture_are_pushed_and_only_for_their_owner(hub, push):
    push()
    assert set(hub.files("org/mine")) - {".gitattributes"} == PUSHED
    assert not [path for path, content in hub.files("org/mine").items() if b"hf_secret" in content]
    assert hub.is_private("org/mine")


def test_a_dry_run_prints_the_list_and_pushes_nothing(hub, push, capsys):
    push("--dry-run")
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == PUSHED
    assert not hub.requests


def test_pushing_the_same_again_makes_no_commit(hub, push):
    push()
    before = hub.commits("org/mine")
    push()
    assert hub.commits("org/mine") == before
    push("--license", "mit")  # another card
    assert len(hub.commits("org/mine")) == len(before) + 1


def test_what_is_no_longer_part_of_it_is_deleted(hub, push, config):
    push()
    stale = Path(config.output_dir) / "pipeline" / "unet" / "old.json"
    stale.write_text("{}")
    push()
    assert "unet/old.json" in hub.files("org/mine")
    stale.unlink()
    push()
    assert "unet/old.json" not in hub.files("org/mine")


def test_a_branch_is_made(hub, push):
    push("--revision", "v1")
    assert set(hub.files("org/mine", "v1")) - {".gitattributes"} == PUSHED
    assert "model_index.json" not in hub.files("org/mine", "main")


def test_a_public_repository_gets_a_run_only_when_told(hub, push):
    push("--public")
    assert not hub.is_private("org/mine")
    before = hub.commits("org/mine")
    with pytest.raises(ValueError, match="is public already; pass --public"):
        push("--license", "mit")
    assert hub.commits("org/mine") == before


# ---------------------------------------------------------------- a Hub that fails


@pytest.mark.slow
def test_a_hub_that_is_down_is_one_sentence_that_says_how_to_repeat(hub, config, tmp_path):
    hub.down()
    environment = os.environ | hub.environment(token="hf_good", home=tmp_path / "home")
    command = [sys.executable, "examples/push.py", "--run", config.output_dir, "--repo", "org/mine"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("push.py: ")]
    assert told.startswith("push.py: the push to org/mine failed (")
    hub.up()
    repeat = [sys.executable, *told.split("repeat it with: python ")[1].split()]
    subprocess.run(repeat, cwd=REPO, env=environment, check=True, timeout=120)
    assert set(hub.files("org/mine")) >= PUSHED


def test_a_connection_dropped_in_the_weights_leaves_the_repository_as_it_was(hub, push):
    hub.drop(after_bytes=10_000, times=20, path_contains="/lfs/")
    with pytest.raises(PushError, match=r"the push to org/mine failed \(.*\); nothing was lost, repeat it with"):
        push()
    assert not PUSHED & set(hub.files("org/mine"))
    hub.drops.clear()
    push()
    assert set(hub.files("org/mine")) >= PUSHED


def test_a_connection_dropped_once_is_got_over(hub, push):
    hub.drop(after_bytes=10_000, times=1, path_contains="/lfs/")
    push()
    assert set(hub.files("org/mine")) >= PUSHED


@pytest.mark.parametrize(("token", "status"), [("hf_bad", "401"), ("hf_other", "403")])
def test_a_token_that_may_not_is_one_sentence(push, token, status):
    with pytest.raises(PushError, match=rf"the push to org/mine failed \(.*{status}.*\)"):
        push(token=token)


@pytest.mark.parametrize("what", ["run", "pipeline"])
def test_a_folder_without_a_pipeline_is_one_sentence(config, tmp_path, what):
    options = {"run": config.output_dir, "repo": "org/mine", "pipeline": "pipeline"} | {what: str(tmp_path / "none")}
    with pytest.raises(ValueError, match=r"run=.* has no pipeline in .*none"):
        stage(PushConfig(**options), tmp_path)


# ---------------------------------------------------------------- during training


def run_training(hub, home: Path, config: TrainConfig, *argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | hub.environment(token="hf_good", home=home)
    command = [sys.executable, "examples/train.py", write_config(config), *argv]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


PUSHING = CLASSES | {"push_to": "org/pushed", "push_every": 6}


@pytest.mark.slow
def test_a_run_is_pushed_while_it_trains(hub, few_images, tmp_path):
    run_training(hub, tmp_path, make_recipe(tmp_path / "run", data=few_images, **PUSHING | {"steps": 12}))
    assert hub.is_private("org/pushed") and set(hub.files("org/pushed")) >= PUSHED
    weights = (tmp_path / "run" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hub.files("org/pushed")["unet/diffusion_pytorch_model.safetensors"] == weights


@pytest.mark.slow
def test_training_goes_on_where_the_hub_is_down(hub, few_images, tmp_path):
    hub.down()
    config = make_recipe(tmp_path / "run", data=few_images, **PUSHING)
    done = run_training(hub, tmp_path, config)
    assert "the push to org/pushed failed" in done.stdout
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()
    hub.up()
    command = re.search(r"repeat it with: python (examples/push.py .*)", done.stdout)[1].split()
    environment = os.environ | hub.environment(token="hf_good", home=tmp_path)
    subprocess.run([sys.executable, *command], cwd=REPO, env=environment, check=True, timeout=120)
    assert set(hub.files("org/pushed")) >= PUSHED


@pytest.mark.parametrize("options", [{"push_every": 4, "push_to": "org/x"}, {"push_every": 3}, {"push_to": "org/x"}])
def test_pushes_that_cannot_be_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"push_every=\d+ must be a multiple of save_every=3"):
        make_recipe(tmp_path, save_every=3, **options)


# ---------------------------------------------------------------- the card


@pytest.fixture(scope="module")
def card(config, tmp_path_factory) -> ModelCard:
    folder = tmp_path_factory.mktemp("staged")
    named = {"license": "mit", "dataset": "zalando-datasets/fashion_mnist", "dataset_license": "mit"}
    stage(PushConfig(config.output_dir, "org/mine", **named), folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_names_licence_data_and_metrics_where_the_hub_reads_them(card, config):
    data = card.data
    assert (data.license, data.datasets, data.library_name) == ("mit", ["zalando-datasets/fashion_mnist"], "diffusers")
    (result,) = data.eval_results
    logged = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry["held_out_loss"] for entry in logged if "held_out_loss" in entry]
    assert result.metric_value == pytest.approx(held_out[-1], abs=1e-5)
    assert result.dataset_name == "zalando-datasets/fashion_mnist" and "20 images" in result.metric_args["protocol"]


def test_the_card_has_the_whole_recipe_and_nothing_of_the_machine(card, config):
    for name in TrainConfig.__dataclass_fields__:
        private = name in ("output_dir", "resume", "overwrite", "push_to", "push_every", "push_public")
        assert bool(re.search(rf"^{name}:", card.text, re.MULTILINE)) is not private, name
    assert str(Path(config.output_dir).parent) not in card.content and str(Path.home()) not in card.content
    assert "6 of 8 images: 48 images seen" in card.text and "decay 0.9999" in card.text


@pytest.mark.slow
@pytest.mark.parametrize("loader", [0, 1], ids=["ddpm_pipe", "diffusers"])
def test_the_usage_in_the_card_works_as_it_stands(card, hub, push, tmp_path, loader):
    push()
    code = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)[loader]
    environment = os.environ | hub.environment(token="hf_good", home=tmp_path)
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "sample.png").exists()


def test_the_duration_is_that_of_the_log():
    entries = [
        {"step": 10, "images_per_second": 80.0},
        {"step": 10, "held_out_loss": 1.0},
        {"step": 15, "images_per_second": 20.0},
    ]
    assert training_seconds(entries, batch_size=8) == pytest.approx(10 * 8 / 80 + 5 * 8 / 20)
