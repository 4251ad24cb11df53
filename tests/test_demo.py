"""The page: its calls draw what the pipelines draw, its code draws the same again, and a browser shows both."""

import io
import json
import shutil
import socket
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import one_sentence
from PIL import Image
from test_pipeline import our_unet, stock_unet

from ddpm_pipe import DDIMScheduler, DDPMPipeline, DDPMScheduler
from ddpm_pipe.cli import main
from ddpm_pipe.demo.config import DemoConfig, Settings
from ddpm_pipe.demo.draw import (
    FRAMES,
    OWN,
    RECOMMENDED,
    SAMPLERS,
    Model,
    draw,
    enlarged,
    fitted,
    interpolate,
    redraw,
    similar,
    watch,
)
from ddpm_pipe.samplers import Sampler, Samplers
from ddpm_pipe.weights import sha256

STEPS, CLASSES = 20, 3
KINDS = {
    "grey, classes": {"in_channels": 1, "out_channels": 1, "num_class_embeds": CLASSES},
    "colour": {},
    "not square": {"sample_size": (6, 10), "num_class_embeds": CLASSES},
    "learned variance": {"out_channels": 6},
    "self-conditioned": {"in_channels": 4, "out_channels": 4, "self_condition": True},
    "stock": {"stock": True},
}


def save(folder: Path, own=None, stock: bool = False, **network) -> str:
    """Save a pipeline with random weights and return its folder."""
    learned = {"variance_type": "learned_range"} if network.get("out_channels") == 6 else {}
    own = own or DDPMScheduler(STEPS, beta_schedule="squaredcos_cap_v2", **learned)
    DDPMPipeline((stock_unet if stock else our_unet)(**network), own).save_pretrained(folder)
    return str(folder)


def load(folder: str) -> Model:
    return Model.load(DemoConfig(model=folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    top = tmp_path_factory.mktemp("models")
    return {name: save(top / name.replace(", ", "-"), **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def model(request, folders) -> Model:
    return load(folders[request.param])


@pytest.fixture(scope="module")
def grey(folders) -> Model:
    return load(folders["grey, classes"])


def settings(model: Model, **changes) -> Settings:
    return model.first_settings.replace(**{"steps": 4, "seed": 5} | changes)


def same(first: list[Image.Image], second: list[Image.Image]) -> bool:
    return [(i.mode, i.size, i.tobytes()) for i in first] == [(i.mode, i.size, i.tobytes()) for i in second]


def photo(width: int = 21, height: int = 17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# ---------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_is_what_the_pipeline_draws(grey, sampler):
    drawn = draw(grey, settings(grey, sampler=sampler, guidance_scale=1.5), 3).run(grey)
    names = {"dpm++": "DPMSolverMultistep", "dpm++sde": "DPMSolverMultistep", "unipc": "UniPCMultistep"}
    names |= {"euler": "EulerDiscrete", "heun": "HeunDiscrete"}
    ours = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    cls = ours.get(sampler) or getattr(diffusers, f"{names[sampler]}Scheduler")
    options = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm++sde" else {}
    pipeline = DDPMPipeline.from_pretrained(grey.config.model)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, timestep_spacing="trailing", **options)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    labels = [2, 0, 1]  # each class in turn: the label of a seed is seed % 3
    expected = pipeline(3, seeds, num_inference_steps=4, class_labels=labels, guidance_scale=1.5).images
    assert same(drawn, expected)


def test_calls_leave_the_scheduler_of_the_model_alone(grey):
    before = grey.pipeline.scheduler
    draw(grey, settings(grey, sampler="euler"), 1).run(grey)
    assert grey.pipeline.scheduler is before is grey.pipeline.own_scheduler


def test_an_image_depends_on_its_seed_alone(grey):
    first = draw(grey, settings(grey, class_labels="1"), 3).run(grey)[2]
    (alone,) = draw(grey, settings(grey, class_labels="1", seed=7), 1).run(grey)
    assert np.abs(np.asarray(first, int) - np.asarray(alone, int)).max() <= 1


@pytest.mark.parametrize("kind", [draw, interpolate, similar, redraw])
def test_the_code_draws_the_same_images(model, kind, tmp_path, monkeypatch):
    chosen = settings(model, sampler="dpm++")
    mask = Image.new("L", (21, 17))
    mask.paste(255, (0, 0, 10, 17))
    rest = {draw: (2,), interpolate: (9, 3), similar: (photo(), 2, 0.5), redraw: (photo(), mask, 2, 2)}[kind]
    call = kind(model, chosen, *rest)
    drawn = call.run(model)
    with zipfile.ZipFile(io.BytesIO(call.archive(model, drawn))) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec((tmp_path / "draw.py").read_text(), names)
    assert len(drawn) == (3 if kind is interpolate else 2) and same(names["images"], drawn)
    assert same([Image.open(f"{i}.png") for i in range(len(drawn))], drawn)


def test_the_code_names_revision_and_precision(folders):
    config = DemoConfig(model=folders["colour"], dtype="bfloat16")
    model = Model.load(config)
    code = draw(model, settings(model), 1).code(Model(config.replace(revision="v1"), model.pipeline, []))
    assert f'from_pretrained("{folders["colour"]}", revision="v1", torch_dtype=torch.bfloat16)' in code


def test_without_a_class_there_is_no_guidance(grey):
    options = draw(grey, settings(grey, class_labels=None, guidance_scale=3.0), 1).options
    assert options == {"batch_size": 1, "num_inference_steps": 4}


def test_what_is_not_painted_is_kept_exactly(model):
    _, height, width = model.pipeline.image_shape
    (image,) = draw(model, settings(model), 1).run(model)
    canvas, mask = enlarged(image), Image.new("L", enlarged(image).size)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    call = redraw(model, settings(model), canvas, mask, 2, 3)
    drawn = [np.asarray(each).reshape(height, width, -1) for each in call.run(model)]
    given = np.asarray(image).reshape(height, width, -1)
    for each in drawn:
        assert (each[:, width // 2 :] == given[:, width // 2 :]).all()
        assert (each[:, : width // 2] != given[:, : width // 2]).any()
    assert call.options["jump_length"] == 3 and same([call.images["image"]], [image])


def test_redrawing_takes_ddim_where_it_is_chosen_and_else_ddpm(grey):
    mask = Image.new("L", (8, 8), 255)
    chosen = [redraw(grey, settings(grey, sampler=name), mask, mask, 1, 1).scheduler for name in ("ddim", "dpm++")]
    assert [type(each) for each in chosen] == [DDIMScheduler, DDPMScheduler]


def test_a_photo_is_fitted_as_in_training(model):
    channels, height, width = model.pipeline.image_shape
    image = fitted(model, photo(40, 24).convert("RGBA"))
    assert image.size == (width, height) and image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


def test_one_step_needs_no_jump(grey):
    mask = Image.new("L", (8, 8), 255)
    assert len(redraw(grey, settings(grey, steps=1), mask, mask, 1, 5).run(grey)) == 1


# ---------------------------------------------------------------- watching


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_way_goes_from_the_noise_to_the_image(grey, sampler):
    chosen = settings(grey, sampler=sampler)
    frames = watch(grey, draw(grey, chosen, 1))
    (image,) = draw(grey, chosen, 1).run(grey)
    assert same([frames[-1].x_t, frames[-1].x0], [image, image])
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    pixels = ((noise / 2 + 0.5).clamp(0, 1) * 255).round().numpy()[0, 0]
    assert np.abs(np.asarray(frames[0].x_t, int) - pixels).max() <= 1
    steps = 7 if sampler == "heun" else 4  # Heun evaluates the network twice in all steps but the last
    assert [frame.title[:11] for frame in frames[:-1]] == [f"step {i + 1} of {steps}" for i in range(steps)]


def test_the_last_estimate_of_ddim_is_the_image(grey):
    *_, last, image = watch(grey, draw(grey, settings(grey, sampler="ddim", steps=STEPS), 1))
    assert same([last.x0], [image.x0]) and last.title == f"step {STEPS} of {STEPS}, timestep 0"


def test_of_many_steps_some_are_kept(tmp_path):
    model = load(save(tmp_path / "long", DDPMScheduler(2 * FRAMES)))
    frames = watch(model, draw(model, settings(model, steps=2 * FRAMES, sampler="ddpm"), 1))
    assert len(frames) == FRAMES + 1
    assert [frames[i].title.split(" of ")[0] for i in (0, 1, 2)] == ["step 1", "step 3", "step 5"]


# ---------------------------------------------------------------- how it opens


def carry(folder: str, **values) -> None:
    """Give a pipeline folder a recommended sampler."""
    weights = next(Path(folder).glob("unet/*.safetensors"))
    sampler = Sampler(protocol="a test", **values)
    Samplers(unet_sha256={weights.name: sha256(weights)}, recommended=sampler).write(Path(folder))


@pytest.mark.parametrize("timesteps", [None, [19, 9, 3]])
def test_the_recommended_sampler_leads(folders, tmp_path, timesteps):
    folder = str(shutil.copytree(folders["grey, classes"], tmp_path / "carries"))
    carry(folder, scheduler="DDIMScheduler", steps=3, timesteps=timesteps, guidance_scale=1.5, class_labels="balanced")
    model = load(folder)
    first = model.first_settings
    assert (first.sampler, first.steps, first.guidance_scale) == (RECOMMENDED, 3, 1.5)
    assert next(iter(model.samplers.values())) == "Recommended: DDIM, 3 steps"
    pipeline = DDPMPipeline.from_pretrained(folder)
    options = pipeline.use_recommended_sampler()
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert same(draw(model, first, 2).run(model), pipeline(2, seeds, class_labels=[0, 1], **options).images)
    assert len(similar(model, first, photo(), 2, 0.5).run(model)) == 2
    for changes in ({"guidance_scale": 1.0}, {"class_labels": None}):
        call = draw(model, first.replace(**changes), 1)
        assert "guidance_scale" not in call.options and call.run(model)


def test_a_model_of_few_steps_leads_with_its_own_scheduler(tmp_path):
    model = load(save(tmp_path / "few", diffusers.LCMScheduler(STEPS, original_inference_steps=STEPS)))
    first = model.first_settings
    assert (first.sampler, first.steps, first.guidance_scale) == (OWN, 4, 1.0)
    call = draw(model, first, 1)
    assert type(call.scheduler) is diffusers.LCMScheduler and len(call.run(model)) == 1


def test_class_names_come_from_the_run_or_the_card(folders, tmp_path):
    run = tmp_path / "run"
    folder = shutil.copytree(folders["grey, classes"], run / "pipeline")
    assert load(str(folder)).class_names == ["class 0", "class 1", "class 2"]
    (run / "plan.json").write_text(json.dumps({"class_names": ["a", "b"]}))
    assert load(str(folder)).class_names == ["class 0", "class 1", "class 2"]  # those of another model
    (run / "plan.json").write_text(json.dumps({"class_names": ["cat", "dog", "sheep, or goat"]}))
    assert load(str(folder)).class_names == ["cat", "dog", "sheep, or goat"]
    alone = shutil.copytree(folder, tmp_path / "downloaded")
    (alone / "README.md").write_text('---\nclass_names:\n- cat\n- 7\n- "sheep, or goat"\n---\n')
    assert load(str(alone)).class_names == ["cat", "7", "sheep, or goat"]
    for damaged in ("---\nclass_names: [cat\n---\n", "---\nclass_names: 7\n---\n", "no metadata"):
        (alone / "README.md").write_text(damaged)
        assert load(str(alone)).class_names == ["class 0", "class 1", "class 2"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": -1}, ["seed=-1"]),
        ({"seed": None}, ["seed=None"]),
        ({"seed": 2**53}, ["seed="]),
        ({"steps": 0}, ["steps=0"]),
        ({"steps": STEPS + 1}, ["num_inference_steps=21", "20"]),
        ({"sampler": "magic"}, ["sampler", "magic", "dpm++"]),
        ({"class_labels": "3"}, ["class_labels='3'", "0 to 2"]),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(grey, changes, parts):
    with one_sentence(*parts):
        draw(grey, settings(grey, **changes), 1).run(grey)


def test_editing_needs_an_image_and_something_painted(grey):
    with one_sentence("no image yet"):
        similar(grey, settings(grey), None, 1, 0.5)
    with one_sentence("no image yet"):
        redraw(grey, settings(grey), None, None, 1, 1)
    with one_sentence("Nothing is painted"):
        redraw(grey, settings(grey), photo(), Image.new("L", (21, 17)), 1, 1)


def test_images_that_are_no_pictures_are_refused(tmp_path):
    folder = save(tmp_path / "two", in_channels=2, out_channels=2)
    with one_sentence("draws 2 channels"):
        load(folder)


def test_a_model_that_is_not_there_ends_the_command_with_one_sentence(tmp_path, capsys):
    pytest.importorskip("gradio", reason="the page needs gradio")
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--model", str(tmp_path)])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("ddpm-pipe demo: ") and "model_index.json" in told


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ddpm_pipe.demo.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["demo", "--model", "x"])
    told = "ddpm-pipe demo: The page needs gradio; install it with pip install 'ddpm_pipe[demo]'.\n"
    assert capsys.readouterr().err == told


# ---------------------------------------------------------------- in a browser


def in_a_browser(test):
    """Mark a test as one of those that share a server and a browser."""
    return pytest.mark.slow(pytest.mark.xdist_group("browser")(test))


def served(model: str, function: str = "demo") -> str:
    """Serve the page of a model until this process ends, with `demo` or `serve_space`, and return its address."""
    app = pytest.importorskip("ddpm_pipe.demo.app", reason="the page needs gradio", exc_type=ValueError)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = DemoConfig(model=model, port=port, open=False)
    threading.Thread(target=getattr(app, function), args=(config,), daemon=True).start()
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(address)
            return address
        except OSError:
            assert time.monotonic() < deadline, "the page does not answer"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def address(folders):
    return served(folders["grey, classes"])


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(address)
    page.get_by_label("Steps").first.fill("4")
    page.keyboard.press("Tab")
    yield page
    page.close()


def pictures(page, selector: str, count: int) -> list[Image.Image]:
    """Wait for so many pictures and return them as the server sends them."""
    page.locator(selector).nth(count - 1).wait_for()
    sources = [each.get_attribute("src") for each in page.locator(selector).all()]
    assert len(sources) == count
    return [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]


@in_a_browser
def test_a_browser_shows_and_saves_what_the_pipeline_draws(page, address, folders, grey):
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.get_by_label("Steps").first.fill("4")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Draw", exact=True).click()
    shown = pictures(page, ".results img", 16)
    pipeline = DDPMPipeline.from_pretrained(folders["grey, classes"])
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    seeds = [torch.Generator().manual_seed(seed) for seed in range(16)]
    labels = [seed % CLASSES for seed in range(16)]
    expected = pipeline(16, seeds, num_inference_steps=4, class_labels=labels, guidance_scale=2.0).images
    assert same(shown, expected)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download images and code").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert same([Image.open(archive.open(f"{i}.png")) for i in range(16)], expected)
    assert "DPMSolverMultistepScheduler" in page.locator(".cm-content").first.inner_text()
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)


@in_a_browser
def test_a_browser_goes_back_and_forth_between_noise_and_image(page, grey):
    frames = watch(grey, draw(grey, settings(grey, seed=0), 1))
    page.get_by_role("tab", name="Watch").click()
    page.get_by_role("button", name="Draw and watch").click()
    assert same(pictures(page, ".picture img", 2), [frames[2].x_t, frames[2].x0])
    slider = page.locator("input[type=range]:visible").last
    slider.press("ArrowRight")
    page.get_by_text("step 4 of 4").wait_for()
    page.wait_for_timeout(500)
    assert same(pictures(page, ".picture img", 2), [frames[3].x_t, frames[3].x0])


@in_a_browser
def test_what_is_painted_in_a_browser_is_drawn_anew(page, grey):
    (start,) = draw(grey, settings(grey, seed=0), 1).run(grey)
    page.get_by_role("tab", name="Redraw a part").click()
    page.get_by_role("button", name="Redraw", exact=True).click()
    page.get_by_text("There is no image yet; put one in, or draw one from the seed.").wait_for()
    page.get_by_role("button", name="Draw one from the seed").first.click()
    canvas = page.locator("#painted canvas").first
    while len(Image.open(io.BytesIO(canvas.screenshot())).convert("L").getcolors()) < 30:
        page.wait_for_timeout(100)  # until it shows the image
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=5)
    page.mouse.up()
    page.get_by_role("button", name="Redraw", exact=True).click()
    for drawn in pictures(page, ".results img", 4):
        changed = np.asarray(drawn) != np.asarray(start)
        assert changed[3:5, 3:5].any() and not changed[[0, -1]].any() and not changed[:, [0, -1]].any()


@in_a_browser
def test_wrong_input_is_one_sentence_on_the_page_and_a_phone_has_room_for_it(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_label("Seed").first.fill("-1")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("seed=-1 must be greater than or equal to 0.").wait_for()
    for name in ("Draw", "Watch"):
        page.get_by_role("tab", name=name).first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@in_a_browser
def test_a_space_whose_model_does_not_load_says_so_on_its_page(browser, tmp_path):
    page = browser.new_page()
    page.goto(served(str(tmp_path), "serve_space"))
    with pytest.raises(ValueError, match=r"model_index\.json") as refusal:
        load(str(tmp_path))
    page.get_by_text(f"This model does not load: {refusal.value}").wait_for()
    page.close()
