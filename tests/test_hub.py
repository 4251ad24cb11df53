"""Sharing a run: what is pushed, its card, and a Hub that fails."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import one_sentence
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from runs import REPO, make_recipe, write_config

from ddpm_pipe import DDPMPipeline
from ddpm_pipe.config import parse, read_config_file
from ddpm_pipe.sampling.protocol import weights_sha256
from ddpm_pipe.sharing.card import make_card, training_seconds
from ddpm_pipe.sharing.config import PushConfig
from ddpm_pipe.sharing.push import Pusher, repeated, stage
from ddpm_pipe.sharing.push import push as share
from ddpm_pipe.sharing.upload import PushError
from ddpm_pipe.training.config import TrainConfig

pytestmark = pytest.mark.xdist_group("hub")

CLASSES = {"class_conditional": True, "holdout": 20, "save_every": 3, "sample_every": 3, "log_every": 2}


PRIVATE = (
    *("token", "logs/x.json", "pipeline/.env", "pipeline/optimizer.bin", "pipeline/secrets.json", "pipeline/other.py"),
    *("pipeline/unet/notes.txt", "pipeline/unet/.hidden.json", "pipeline/unet/secrets.json", "pipeline/more/x.json"),
    *("pipeline/unet/old/diffusion_pytorch_model.safetensors", "pipeline/diffusion_pytorch_model.safetensors"),
)


@pytest.fixture(scope="module")
def config(lives, few_images, tmp_path_factory) -> TrainConfig:
    """A finished run, with things beside it that are nobody's business."""
    config = make_recipe(tmp_path_factory.mktemp("shared") / "run", data=few_images, **CLASSES)
    lives.complete(write_config(config))
    run = Path(config.output_dir)
    for private in PRIVATE:
        (run / private).parent.mkdir(parents=True, exist_ok=True)
        (run / private).write_text("hf_secret")
    return config


@pytest.fixture
def hub():
    with HubServer(tokens={"hf_good": "org", "hf_other": "stranger"}) as server:
        yield server


@pytest.fixture
def push(hub, config, monkeypatch):
    """`ddpm-pipe push` in this process, with the settings that another would have from its environment."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts

    def push(*argv: str, token: str = "hf_good") -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        share(parse(PushConfig, ["--run", config.output_dir, "--repo", "org/mine", *argv]))

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


def test_files_that_others_put_into_the_repository_are_left_alone(hub, push):
    push()
    others = ("diagram.png", "app.py", "unet/notes.txt", "scheduler/old.json", "unet/model.onnx")
    api = HfApi(endpoint=hub.url, token="hf_good")
    for name in others:
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo=name, repo_id="org/mine")
    push("--license", "mit")
    assert set(others) < set(hub.files("org/mine"))


def test_pushing_the_same_again_makes_no_commit(hub, push):
    push()
    before = hub.commits("org/mine")
    push()
    assert hub.commits("org/mine") == before
    push("--license", "mit")  # another card
    assert len(hub.commits("org/mine")) == len(before) + 1


def test_what_is_no_longer_part_of_it_is_deleted(hub, push, config):
    push()
    stale = Path(config.output_dir) / "pipeline" / "scheduler" / "ddpm_schedulers.py"
    stale.write_text("")
    push()
    assert "scheduler/ddpm_schedulers.py" in hub.files("org/mine")
    stale.unlink()
    push()
    assert "scheduler/ddpm_schedulers.py" not in hub.files("org/mine")


def test_the_address_is_printed(push, hub, capsys):
    push()
    assert f"pushed to {hub.url}/org/mine" in capsys.readouterr().out


@pytest.fixture
def own(config, tmp_path) -> PushConfig:
    """A push of a copy of the run, which a test may change."""
    return PushConfig(run=str(shutil.copytree(config.output_dir, tmp_path / "home" / "own")), repo="org/mine")


LINKS = (
    *(
        "pipeline",
        "config.yaml",
        "plan.json",
        "metrics.jsonl",
        "pipeline/model_index.json",
        "pipeline/unet",
        "pipeline/unet/config.json",
        "pipeline/ddpm_pipeline.py",
    ),
    *("pipeline/unet/diffusion_pytorch_model.safetensors", "pipeline/evaluation.json", "evaluation.json", "samples"),
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_not_followed(own, tmp_path, name):
    link, elsewhere = Path(own.run) / name, tmp_path / "elsewhere"
    if link.exists():
        link.rename(elsewhere)
    else:
        elsewhere.write_text("{}")
    link.symlink_to(elsewhere)
    (tmp_path / "staged").mkdir()
    with pytest.raises(ValueError, match=f"{name} is a link, and links are not pushed"):
        stage(own, tmp_path / "staged")


@pytest.mark.parametrize("data", ["{home}/images", "{home}/*/x-*.parquet", "~/private/images", "{home}/moved/away"])
def test_no_file_that_is_pushed_names_a_path_of_this_machine(own, tmp_path, monkeypatch, data):
    run, home = Path(own.run), tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    (home / "images").mkdir()
    recipe = read_config_file(run / "config.yaml") | {"data": data.format(home=home)}
    (run / "config.yaml").write_text(json.dumps(recipe))
    for name in ("model_index", "unet/config", "scheduler/scheduler_config"):
        file = run / "pipeline" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": str(run / "pipeline")}))
    sampling = {"model": str(run / "pipeline"), "unet_sha256": weights_sha256(run / "pipeline")}
    points = [{"settings": {"model": str(run / "pipeline")}, "sampling": sampling, "metrics": []}]
    result = {"sampling": sampling, "points": points, "metrics": []}
    (run / "pipeline" / "evaluation.json").write_text(json.dumps(result))
    folder = tmp_path / "staged"
    folder.mkdir()
    stage(own, folder)
    texts = {path: path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".py")}
    assert len(texts) == len(PUSHED) - 2 + 1  # without weights and picture, with the evaluation
    for path, text in texts.items():
        for private in (str(tmp_path), str(Path.home()), "~/", '"_name_or_path":'):
            assert private not in text, (path.name, private)


def test_an_evaluation_that_cannot_be_read_stops_a_push_and_no_training(own, tmp_path, capsys):
    (Path(own.run) / "pipeline" / "evaluation.json").write_text('{"metrics": [')
    with pytest.raises(ValueError, match=r"evaluation\.json is not what ddpm-pipe evaluate writes"):
        stage(own, tmp_path)
    Pusher(own).push()
    assert capsys.readouterr().out.startswith("nothing is pushed: ")


def test_the_command_that_repeats_a_push_has_all_its_options():
    given = PushConfig(run="runs/my run", repo="org/x", public=True, pipeline="ema-0.05", license="mit")
    command = shlex.split(repeated(given))
    assert command[:2] == ["ddpm-pipe", "push"] and parse(PushConfig, command[2:]) == given


def test_a_pipeline_without_a_run_is_pushed_with_a_card_and_for_its_owner_only(push, hub, config, tmp_path, capsys):
    pipeline = DDPMPipeline.from_pretrained(Path(config.output_dir) / "pipeline")
    address = pipeline.push_to_hub("org/alone", token="hf_good")
    assert address in capsys.readouterr().out and hub.is_private("org/alone")
    assert set(hub.files("org/alone")) - {".gitattributes"} == PUSHED - {"samples.png"}
    card = ModelCard(hub.files("org/alone")["README.md"].decode())
    assert card.data.library_name == "diffusers" and "8x8 images with 1 channel" in card.text
    assert "conditional on 10 classes" in card.text and "Nothing is known here of the training" in card.text
    assert 'from_pretrained("org/alone")' in card.text and "samples.png" not in card.text
    assert "model-index" not in hub.files("org/alone")["README.md"].decode()
    pipeline.push_to_hub("org/default", token="hf_good", private=None)
    assert hub.is_private("org/default")
    pipeline.push_to_hub("org/shown", token="hf_good", private=False)
    assert not hub.is_private("org/shown")
    with pytest.raises(ValueError, match="is public already"):
        pipeline.push_to_hub("org/shown", token="hf_good")
    with pytest.raises(ValueError, match=r"call push_to_hub\(repo_id\) of the pipeline"):
        pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="org/saved")
    assert not (tmp_path / "saved").exists()


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


@pytest.mark.parametrize("name", ["../elsewhere", "pipeline/unet", ".", ""])
def test_only_a_folder_of_the_run_is_pushed(own, tmp_path, name):
    shutil.copytree(Path(own.run) / "pipeline", Path(own.run).parent / "elsewhere")
    with pytest.raises(ValueError, match=r"pipeline=.* must be the name of a folder in run="):
        stage(own.replace(pipeline=name), tmp_path)


# ---------------------------------------------------------------- a Hub that fails


@pytest.mark.slow
def test_a_hub_that_is_down_is_one_sentence_that_says_how_to_repeat(hub, config, tmp_path):
    hub.down()
    environment = os.environ | hub.environment(token="hf_good", home=tmp_path / "home")
    command = [sys.executable, "-m", "ddpm_pipe", "push", "--run", config.output_dir, "--repo", "org/mine"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("ddpm-pipe push: ")]
    assert told.startswith("ddpm-pipe push: the push to org/mine failed (")
    hub.up()
    repeat = [sys.executable, "-m", "ddpm_pipe", *told.split("repeat it with: ddpm-pipe ")[1].split()]
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
    one_line = rf"^the push to org/mine failed \(.*{status}.*\)[^\n]*$"  # it ends with a command, not with a full stop
    with pytest.raises(PushError, match=one_line):
        push(token=token)


@pytest.mark.parametrize("what", ["run", "pipeline"])
def test_a_folder_without_a_pipeline_is_one_sentence(config, tmp_path, what):
    options = {"run": config.output_dir, "repo": "org/mine", "pipeline": "pipeline"} | {what: "none"}
    with one_sentence(match=r"run=.* has no pipeline in .*none"):
        stage(PushConfig(**options), tmp_path)


# ---------------------------------------------------------------- during training


def run_training(hub, home: Path, config: TrainConfig, *argv: str) -> subprocess.CompletedProcess:
    environment = os.environ | hub.environment(token="hf_good", home=home)
    command = [sys.executable, "-m", "ddpm_pipe", "train", write_config(config), *argv]
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
    command = re.search(r"repeat it with: ddpm-pipe (push .*)", done.stdout)[1].split()
    environment = os.environ | hub.environment(token="hf_good", home=tmp_path)
    subprocess.run([sys.executable, "-m", "ddpm_pipe", *command], cwd=REPO, env=environment, check=True, timeout=120)
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
    stage(PushConfig(run=config.output_dir, repo="org/mine", **named), folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_names_licence_data_and_metrics_where_the_hub_reads_them(card, config):
    data = card.data
    assert (data.license, data.datasets, data.library_name) == ("mit", ["zalando-datasets/fashion_mnist"], "diffusers")
    assert data.get("class_names")[:2] == ["T-shirt/top", "Trouser"] and len(data.get("class_names")) == 10
    (result,) = data.eval_results
    logged = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry["held_out_loss"] for entry in logged if "held_out_loss" in entry]
    assert result.metric_value == pytest.approx(held_out[-1], abs=1e-5)
    assert result.dataset_name == "zalando-datasets/fashion_mnist" and "20 images" in result.metric_args["protocol"]


def test_the_card_has_the_whole_recipe_and_nothing_of_the_machine(card, config):
    for name in TrainConfig.model_fields:
        private = name in ("output_dir", "resume", "overwrite", "plan", "push_to", "push_every", "push_public")
        assert bool(re.search(rf"^{name}:", card.text, re.MULTILINE)) is not private, name
    assert str(Path(config.output_dir).parent) not in card.content and str(Path.home()) not in card.content
    assert "6 of 8 images: 48 images seen" in card.text and "decay 0.9999" in card.text


def staged_card(push: PushConfig, folder: Path) -> ModelCard:
    folder.mkdir()
    stage(push, folder)
    return ModelCard.load(folder / "README.md")


def test_the_card_of_another_average_has_no_loss_and_no_picture_of_the_first(own, tmp_path):
    shutil.copytree(Path(own.run) / "pipeline", Path(own.run) / "ema-0.1")
    other = staged_card(own.replace(pipeline="ema-0.1"), tmp_path / "staged")
    assert "sigma_rel 0.1" in other.text and "held-out loss" not in other.content and "samples.png" not in other.content
    assert other.data.eval_results is None and not (tmp_path / "staged" / "samples.png").exists()


def test_the_card_of_a_killed_run_ends_where_its_pipeline_was_saved(own, config, tmp_path):
    with (Path(own.run) / "metrics.jsonl").open("a") as log:
        log.write('{"step": 8, "loss": 1.0, "images_per_second": 1.0}\n{"step": 8, "held_out_loss": 1e9}\n')
    (Path(own.run) / "samples" / "step-00000008.png").write_text("drawn by later weights")
    later = staged_card(own, tmp_path / "later")
    before = staged_card(PushConfig(run=config.output_dir, repo="org/mine"), tmp_path / "before")
    assert later.content == before.content and "6 of 8 images: 48 images seen" in later.text
    newest = (Path(own.run) / "samples" / "step-00000006.png").read_bytes()
    assert (tmp_path / "later" / "samples.png").read_bytes() == newest


def test_the_usage_in_a_card_names_the_variant_of_the_weights(config, tmp_path):
    DDPMPipeline.from_pretrained(Path(config.output_dir) / "pipeline").save_pretrained(tmp_path, variant="fp16")
    usage = make_card(None, tmp_path, "org/half").text
    assert usage.count('from_pretrained("org/half", variant="fp16"') == 2


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
