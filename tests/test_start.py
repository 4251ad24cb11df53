"""A run that starts from a trained model: which weights are copied, what its config takes over, and what is refused."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import one_sentence
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard, constants
from runs import NETWORK, STOCK, assert_same, final_state, launch, make_recipe, move_to_root, write_config
from test_recipe import images
from torch import nn

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler, DDPMUNet2DModel
from ddpm_pipe.cli import PRESETS
from ddpm_pipe.config import make_parser, parse
from ddpm_pipe.run.folder import Run
from ddpm_pipe.sharing.card import make_card
from ddpm_pipe.training.config import ModelConfig, TrainConfig
from ddpm_pipe.training.loop import train
from ddpm_pipe.training.recipe import make_scheduler, make_unet
from ddpm_pipe.training.start import find_source, start_from, take_over

pytestmark = pytest.mark.xdist_group("hub")


def moved(network: nn.Module) -> nn.Module:
    """`network` with every weight moved off its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def model(folder: Path, unet=NETWORK, data=None, scheduler=None, **options) -> DDPMPipeline:
    """A trained model, saved in `folder`: the network that a run of these options would train on these images."""
    config = TrainConfig(data="x", unet=unet, **options)
    made = DDPMPipeline(moved(make_unet(config, data or images())), scheduler or make_scheduler(config))
    made.save_pretrained(folder)
    return made


def started(folder: Path, data=None, **options) -> tuple[DDPMUNet2DModel | diffusers.UNet2DModel, str, TrainConfig]:
    """The network of a run that starts from `folder`, what the plan tells of it, and the config of the run."""
    config = TrainConfig(data="x", init_from=str(folder), seed=1, **options)
    source = find_source(config, Run(folder / "run"))
    config = take_over(config, source)
    unet = make_unet(config, data or images())
    return unet, start_from(source, unet, config)["told"], config


def fresh(config: TrainConfig, data=None) -> dict[str, torch.Tensor]:
    return make_unet(config, data or images()).state_dict()


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("unet", "classes", "options"),
    [
        (NETWORK, 0, {}),
        (NETWORK | {"self_condition": True, "time_embedding_type": "random_fourier"}, 3, {}),
        (NETWORK | {"attention_types": ["none", "linear"], "dropout": 0.1}, 0, {"variance_type": "learned_range"}),
        (STOCK, 0, {}),
        (STOCK, 4, {"variance_type": "learned_range"}),
    ],
)
def test_the_same_config_copies_every_weight(tmp_path, unet, classes, options):
    data, labels = images(classes=classes), {"class_conditional": classes > 0}
    pipeline = model(tmp_path, unet, data, **labels, **options)
    network, told, config = started(tmp_path, data, **labels)
    assert_same(network.state_dict(), pipeline.unet.state_dict())
    assert told == "all weights copied" and type(network) is type(pipeline.unet)
    keys = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    assert {key: network.config[key] for key in keys} == keys
    assert same_chain(config, pipeline)


def same_chain(config: TrainConfig, pipeline: DDPMPipeline) -> bool:
    """Whether the scheduler of a run has the whole config of the model's."""
    theirs = {key: value for key, value in pipeline.scheduler.config.items() if key[0] != "_"}
    return theirs == {key: value for key, value in make_scheduler(config).config.items() if key[0] != "_"}


def assert_copied_except(
    network: nn.Module, pipeline: DDPMPipeline, config: TrainConfig, data, names: set[str]
) -> None:
    """The weights of these names are as a run without a model would initialise them, all others are the model's."""
    weights, theirs, initial = network.state_dict(), pipeline.unet.state_dict(), fresh(config, data)
    for name in weights:
        assert torch.equal(weights[name], (initial if name in names else theirs)[name]), name
        assert name not in names or name not in theirs or not torch.equal(weights[name], theirs[name]), name


@pytest.mark.parametrize("unet", [NETWORK, STOCK])
def test_other_channels_leave_the_first_and_last_convolution_new(tmp_path, unet):
    pipeline, grey = model(tmp_path, unet), images(channels=1)
    network, told, config = started(tmp_path, grey)
    assert_copied_except(network, pipeline, config, grey, {"conv_in.weight", "conv_out.weight", "conv_out.bias"})
    assert told == (
        "weights copied; conv_in re-initialised (1 input channels, not 3); "
        "conv_out re-initialised (1 output channels, not 3)"
    )


def test_self_conditioning_is_more_input_channels(tmp_path):
    pipeline = model(tmp_path)
    network, told, config = started(tmp_path, unet={"self_condition": True})
    assert_copied_except(network, pipeline, config, images(), {"conv_in.weight"})
    assert told == "weights copied; conv_in re-initialised (6 input channels, not 3)"


@pytest.mark.parametrize("unet", [NETWORK, STOCK])
@pytest.mark.parametrize(("before", "now"), [(2, 5), (0, 2)])
def test_other_classes_are_new(tmp_path, unet, before, now):
    pipeline = model(tmp_path, unet, images(classes=before), class_conditional=before > 0)
    data = images(classes=now)
    network, told, config = started(tmp_path, data, class_conditional=True)
    assert_copied_except(network, pipeline, config, data, {"class_embedding.weight"})
    counts = f"({now + 1} class embeddings, not {before + (before > 0)})"
    assert told == f"weights copied; class_embedding re-initialised {counts}"


def test_a_run_without_classes_leaves_theirs_out(tmp_path):
    pipeline = model(tmp_path, NETWORK, images(classes=4), class_conditional=True)
    network, told, config = started(tmp_path)
    assert_copied_except(network, pipeline, config, images(), set())
    assert told == "weights copied; class_embedding left out (0 class embeddings, not 5)"


@pytest.mark.parametrize("unet", [NETWORK, STOCK])
def test_learned_variance_begins_at_the_mean_of_the_model(tmp_path, unet):
    pipeline = model(tmp_path, unet)
    network, told, config = started(tmp_path, variance_type="learned_range")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        assert torch.allclose(network.eval()(x, t).sample[:, :3], pipeline.unet(x, t).sample, atol=1e-5)
    assert torch.equal(network.conv_out.weight[3:], fresh(config)["conv_out.weight"][3:])
    assert told == "weights copied; conv_out re-initialised for the variance (6 output channels, not 3)"


def test_without_learned_variance_the_mean_stays(tmp_path):
    pipeline = model(tmp_path, variance_type="learned_range")
    network, told, _ = started(tmp_path, variance_type="fixed_small")
    assert torch.equal(network.conv_out.weight, pipeline.unet.conv_out.weight[:3])
    assert torch.equal(network.conv_out.bias, pipeline.unet.conv_out.bias[:3])
    assert told == "weights copied; conv_out cut to the mean (3 output channels, not 6)"


@pytest.mark.parametrize("unet", [NETWORK, STOCK])
def test_all_weights_fit_another_resolution(tmp_path, unet):
    pipeline = model(tmp_path, unet)
    network, told, _ = started(tmp_path, images(height=12, width=16))
    assert_same(network.state_dict(), pipeline.unet.state_dict())
    assert told == "all weights copied; images are 16x12, not 8x8, which all weights fit"


def test_a_new_level_leaves_the_higher_ones_as_they_were(tmp_path):
    pipeline = model(tmp_path)
    network, told, config = started(tmp_path, unet={"block_out_channels": [8, 16, 16]})
    weights, theirs, initial = network.state_dict(), pipeline.unet.state_dict(), fresh(config)
    new = {name for name in weights if name.startswith(("down_blocks.2.", "up_blocks.0."))}
    new.add("down_blocks.1.downsample.weight")  # no longer that of the last level, which does not halve
    for name in weights:
        old = name.replace("up_blocks.1.", "up_blocks.0.").replace("up_blocks.2.", "up_blocks.1.")
        assert torch.equal(weights[name], initial[name] if name in new else theirs[old]), name
    assert told == (
        "weights copied; down_blocks.1, down_blocks.2, up_blocks.0 re-initialised where they differ (3 levels, not 2)"
    )


def test_a_level_may_be_taken_away(tmp_path):
    pipeline = model(tmp_path, NETWORK | {"block_out_channels": [8, 16, 16]})
    network, told, _ = started(tmp_path, unet={"block_out_channels": [8, 16]})
    weights, theirs = network.state_dict(), pipeline.unet.state_dict()
    assert torch.equal(weights["up_blocks.1.upsample.weight"], theirs["up_blocks.2.upsample.weight"])
    middle = {name for name in weights if name.startswith("mid_")}
    assert middle and all(torch.equal(weights[name], theirs[name]) for name in middle)
    assert told == "weights copied; down_blocks.1 re-initialised where they differ (2 levels, not 3)"


def test_a_new_level_of_a_stock_network(tmp_path):
    pipeline = model(tmp_path, STOCK)
    blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    network, told, _ = started(tmp_path, unet={"block_out_channels": [8, 16, 24], **blocks})
    weights, theirs = network.state_dict(), pipeline.unet.state_dict()
    for now, before in (("down_blocks.0", "down_blocks.0"), ("up_blocks.2", "up_blocks.1")):
        assert_same(
            {name: weight for name, weight in weights.items() if name.startswith(now)},
            {name.replace(before, now): weight for name, weight in theirs.items() if name.startswith(before)},
        )
    assert "down_blocks.1, down_blocks.2, mid_block, up_blocks.0, up_blocks.1 re-initialised" in told


# ---------------------------------------------------------------- the config

CHAINS = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 50},
    {"beta_schedule": "cosine", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_schedule": "sigmoid_alpha_bar", "variance_type": "fixed_large"},  # saved as trained_betas
    {"beta_schedule": "linear_rescaled", "num_train_timesteps": 200, "prediction_type": "sample"},
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_the_chain_is_taken_over(tmp_path, chain):
    pipeline = model(tmp_path, **chain)
    _, told, config = started(tmp_path)
    assert told == "all weights copied" and same_chain(config, pipeline)


def test_keys_that_are_given_win_one_by_one(tmp_path):
    model(tmp_path, NETWORK | {"dropout": 0.3, "layers_per_block": 2}, beta_schedule="scaled_linear", beta_end=0.012)
    _, told, config = started(tmp_path, unet={"dropout": 0.1}, prediction_type="v_prediction", beta_schedule="linear")
    assert (config.unet["dropout"], config.unet["layers_per_block"]) == (0.1, 2)
    assert (config.prediction_type, config.beta_schedule, config.beta_end) == ("v_prediction", "linear", 0.02)
    assert told == ("all weights copied; the output now means v_prediction, not epsilon; the noise levels are others")


def test_what_a_preset_gives_is_given(tmp_path):
    model(tmp_path, prediction_type="sample", num_train_timesteps=50)
    argv = [str(PRESETS["fashion_mnist"]), "--init_from", str(tmp_path), "--data", "x"]
    config = parse(TrainConfig, argv)
    config = take_over(config, find_source(config, Run(tmp_path / "run")))
    assert (config.prediction_type, config.num_train_timesteps) == ("v_prediction", 50)
    assert config.unet["block_out_channels"] == [32, 64, 64]
    assert "what no flag, file or preset gives" in " ".join(make_parser(TrainConfig).format_help().split())


def test_what_the_model_gives_is_checked_with_what_is_given(tmp_path):
    model(tmp_path, prediction_type="v_prediction", num_train_timesteps=2000, beta_end=0.01)
    _, told, config = started(tmp_path, rescale_betas_zero_snr=True, sample_steps=1500)
    assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"
    assert told == "all weights copied; the noise levels are others"


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(50, variance_type="fixed_large", clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(50, 0.001, 0.03, "scaled_linear", prediction_type="v_prediction"),
        DDIMScheduler(50, prediction_type="sample"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_give_their_chain(tmp_path, scheduler):
    model(tmp_path, scheduler=scheduler)
    _, told, config = started(tmp_path, sample_steps=10)
    made = make_scheduler(config)
    torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-5)
    assert made.config.prediction_type == scheduler.config.prediction_type and told == "all weights copied"
    assert made.config.variance_type == (scheduler.config.get("variance_type") or "fixed_small")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("place", ["nowhere/at/all", "./nowhere", "~/nowhere/at/all"])
def test_a_folder_that_is_missing_is_one_sentence(place, recipe):
    config = recipe(init_from=place)
    with one_sentence(f"init_from: {place!r} is neither a folder here nor the id of a repository."):
        train(config)
    assert not Run(config.output_dir).config.exists()


def test_a_folder_without_a_pipeline_and_a_file_are_one_sentence(tmp_path):
    with one_sentence("init_from: ", "holds no pipeline: model_index.json is missing."):
        started(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with one_sentence("model.pt' is a file; ddpm-pipe convert makes a pipeline folder of a checkpoint."):
        started(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"unet": {"_class_name": "UNet2DModel"}},
            ["unet._class_name='UNet2DModel', but init_from=", "DDPMUNet2DModel;"],
        ),
        ({"unet": {"block_out_channels": [8, 24]}}, ["has other blocks (block_out_channels=[8, 16], not [8, 24])"]),
        ({"unet": {"block_out_channels": [16, 16, 16]}}, ["has other blocks (block_out_channels=[8, 16], not [16, "]),
        ({"unet": {"layers_per_block": 2}}, ["(layers_per_block=1, not 2), as its weight 'down_blocks.0.resnets.1"]),
        ({"unet": {"attention_types": "full"}}, ["(attention_types='none', not 'full')"]),
        ({"unet": {"blocks": 2}}, ["unet='blocks' is unknown; use one of"]),
        ({"sample_steps": 60}, ["with what init_from=", "sample_steps=60 is more than num_train_timesteps=50."]),
        ({"prediction_type": "epsilon"}, ["with what init_from=", "rescale_betas_zero_snr needs prediction_type"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(tmp_path, options, parts):
    model(tmp_path, num_train_timesteps=50, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with one_sentence(*parts):
        started(tmp_path, **options)


def test_noise_levels_without_a_name_are_refused_unless_others_are_given(tmp_path):
    betas = torch.linspace(0.001, 0.5, 20).square().tolist()
    model(tmp_path, scheduler=DDPMScheduler(20, trained_betas=betas))
    with one_sentence("has noise levels that no beta_schedule makes; give beta_schedule."):
        started(tmp_path, sample_steps=10)
    _, told, config = started(tmp_path, sample_steps=10, beta_schedule="cosine")
    assert config.num_train_timesteps == 20 and told == "all weights copied; the noise levels are others"


# ---------------------------------------------------------------- runs

TEACHER = {"prediction_type": "v_prediction", "beta_schedule": "sigmoid", "num_train_timesteps": 30}


@pytest.fixture(scope="module")
def finished(lives, few_images, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    config = make_recipe(tmp_path_factory.mktemp("runs") / "teacher", data=few_images, sample_every=0, **TEACHER)
    lives.complete(write_config(config))
    return Path(config.output_dir)


@pytest.fixture
def teacher(finished, tmp_path) -> Path:
    """A copy of the finished run for one test."""
    return shutil.copytree(finished, tmp_path / "teacher")


@pytest.fixture
def student(recipe, few_images):
    """A run that gives nothing of network and noise itself."""

    def student(place: Path | str, **options) -> TrainConfig:
        config = recipe("student", init_from=str(place), data=few_images, sample_every=0)
        kept = config.model_fields_set - ModelConfig.model_fields.keys() | {"init_from"}
        return TrainConfig(**{name: getattr(config, name) for name in kept} | options)

    return student


def test_a_run_begins_with_the_weights_of_another_run_and_its_averages_do(teacher, student, capsys):
    folder = train(student(teacher, steps=1, learning_rate=1e-30))
    weights = DDPMPipeline.from_pretrained(teacher / "pipeline").unet.state_dict()
    state = final_state(student(teacher))
    for copy in ("unet", "ema", "ema-0.05", "ema-0.1"):
        assert_same({name: state[f"{copy}.{name}"] for name in weights}, weights, rtol=0, atol=1e-25)
    saved = TrainConfig(**Run(folder.parent).read_config())
    assert {key: getattr(saved, key) for key in TEACHER} == TEACHER
    assert saved.unet["block_out_channels"] == NETWORK["block_out_channels"] and saved.init_from == str(teacher)
    assert saved.model_fields_set == TrainConfig.model_fields.keys()
    assert f"started from {teacher}: all weights copied\n" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["the same flags", "the config of the run"])
def test_a_resumed_run_does_not_need_the_model_and_ends_with_the_same_bits(teacher, student, how, capsys):
    config = student(teacher, save_every=2, unet={"dropout": 0.1})
    train(config)
    run, whole = Run(config.output_dir), final_state(config)
    plan = run.read_plan()
    shutil.rmtree(run.checkpoint(6))
    teacher.rename(teacher.with_name("gone"))
    capsys.readouterr()
    again = config if how == "the same flags" else TrainConfig(**run.read_config())
    train(again.replace(resume=True))
    assert_same(whole, final_state(config))
    assert run.read_plan() == plan and plan["start"] == {"model": None, "told": "all weights copied"}
    assert "resumed with" not in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_first_checkpoint_reads_the_model_again(teacher, student):
    config = student(teacher)
    train(config)
    whole = final_state(config)
    shutil.rmtree(Run(config.output_dir).checkpoints)
    train(config.replace(resume=True))
    assert_same(whole, final_state(config))


def test_a_teacher_is_retargeted_by_another_prediction_type(teacher, student, capsys):
    folder = train(student(teacher, steps=1, learning_rate=1e-30, prediction_type="epsilon"))
    weights = DDPMPipeline.from_pretrained(teacher / "pipeline").unet.state_dict()
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert_same(pipeline.unet.state_dict(), weights, rtol=0, atol=1e-25)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert "all weights copied; the output now means epsilon, not v_prediction\n" in capsys.readouterr().out


def assert_stock_draws_the_same(folder: Path) -> None:
    """Plain diffusers loads the pipeline in `folder`, and both draw the same images."""
    ours, stock = DDPMPipeline.from_pretrained(folder), diffusers.DDPMPipeline.from_pretrained(folder)
    assert type(stock) is diffusers.DDPMPipeline and type(stock.unet) is diffusers.UNet2DModel
    drawn = []
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn.append(pipeline(2, generator, num_inference_steps=5, output_type="np").images)
    torch.testing.assert_close(*map(torch.from_numpy, drawn), rtol=0, atol=1e-4)


def google(folder: Path) -> Path:
    """A stock pipeline with all files at its root, as google/ddpm-cifar10-32 has them."""
    scheduler = diffusers.DDPMScheduler(20, variance_type="fixed_large")
    made = diffusers.DDPMPipeline(model(folder / "model", STOCK, images(channels=1)).unet, scheduler)
    made.save_pretrained(folder / "stock")
    move_to_root(folder / "stock")
    return folder / "stock"


def test_a_stock_model_stays_one_that_plain_diffusers_loads(tmp_path, student, capsys):
    folder = train(student(google(tmp_path), learning_rate=1e-4))
    assert_stock_draws_the_same(folder)
    scheduler = DDPMPipeline.from_pretrained(folder).scheduler.config
    assert (scheduler.num_train_timesteps, scheduler.variance_type) == (20, "fixed_large")
    assert "stock: all weights copied\n" in capsys.readouterr().out


def test_overwriting_never_deletes_the_model_to_start_from(teacher, student):
    for place in (teacher, teacher / "pipeline"):
        with one_sentence(f"init_from={str(place)!r} lies in output_dir={str(teacher)!r}, which --overwrite deletes."):
            train(student(place, output_dir=str(teacher), overwrite=True))
    assert (teacher / "pipeline").is_dir()


# ---------------------------------------------------------------- the Hub and the card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that holds org/stock, laid out as google/ddpm-cifar10-32."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer({"hf_good": "org"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_good")
        api.create_repo("org/stock")
        api.upload_folder(repo_id="org/stock", folder_path=google(tmp_path))
        yield hub


@pytest.fixture
def from_hub(hub, tmp_path, monkeypatch):
    """This process takes `hub` for the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    files = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}{files}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_a_model_of_the_hub_is_named_in_the_card(from_hub, student):
    folder = train(student("org/stock", class_conditional=True))
    card = make_card(Run(folder.parent), folder, "org/mine")
    assert card.data.base_model == "org/stock"
    assert "| org/stock: weights copied; class_embedding re-initialised (11 class embeddings, not 0) |" in card.text
    assert "\ninit_from: org/stock\n" in card.text
    ModelCard(str(card)).validate()


def test_only_json_and_safetensors_of_it_are_fetched(from_hub, student):
    train(student("org/stock", steps=1))
    fetched = {request.path.rpartition("/")[2] for request in from_hub.requests if "/resolve/" in request.path}
    assert {name.rpartition(".")[2] for name in fetched} == {"json", "safetensors"}


def test_a_model_that_the_hub_lacks_is_one_sentence(from_hub, student):
    with one_sentence("init_from: 'org/none' is no folder here, and the Hub does not give it: "):
        train(student("org/none"))


def test_the_card_does_not_name_a_folder_of_this_machine(teacher, student):
    folder = train(student(teacher))
    card = make_card(Run(folder.parent), folder, "org/mine")
    assert "| started from | another model, which is not named: all weights copied |" in card.text
    assert "\ninit_from: null\n" in card.text and "teacher" not in card.content and card.data.base_model is None


@pytest.mark.slow
def test_processes_start_from_one_download_and_agree(from_hub, student, tmp_path):
    one, two = (
        student("org/stock", class_conditional=True, output_dir=str(tmp_path / name)) for name in ("one", "two")
    )
    train(one)
    before = len(from_hub.requests)
    done = launch(write_config(two), processes=2, **from_hub.environment(home=tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started from org/stock: weights copied; class_embedding re-initialised") == 1
    gets = [request.path for request in from_hub.requests[before:] if request.method == "GET"]
    assert sum("diffusion_pytorch_model.safetensors" in path for path in gets) == 1
    # a softmax does not see the bias of its keys, so that its gradient is rounding, of which AdamW makes whole steps
    states = [
        {name: value for name, value in final_state(config).items() if not name.endswith("to_k.bias")}
        for config in (one, two)
    ]
    assert_same(*states, rtol=1e-3, atol=2e-5)
