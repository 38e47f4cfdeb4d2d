import pytest
import torch
from diffusers import StableDiffusionPipeline

from workbench import zoo
from workbench.errors import UnknownNameError
from workbench.zoo import evaluate, shapes
from workbench.zoo.autoencoder import psnr
from workbench.zoo.scoring import score

PROMPTS = (
    "a blue circle",
    "a large red circle and a small blue square on a dark background",
    "a green cross and a yellow circle on a light background",
    "a small purple triangle on a light background",
    "a red circle and a purple square",
    "a large yellow square on a dark background",
)


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path("shapes-unet"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_zoo_has_its_model_and_names_it_when_another_is_asked_for():
    assert zoo.models() == ("shapes-unet",)
    assert (zoo.path("shapes-unet") / "model_index.json").is_file()
    with pytest.raises(UnknownNameError, match=r"'shapes-unett'.*'shapes-unet'"):
        zoo.path("shapes-unett")


def test_the_folder_is_small_enough_to_ship():
    sizes = [file.stat().st_size for file in zoo.path("shapes-unet").rglob("*") if file.is_file()]
    assert 4e6 < sum(sizes) <= 16e6


def test_the_pipeline_is_complete_and_of_one_type(pipeline):
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == 24
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_images_show_what_their_prompts_ask_for(pipeline):
    images = evaluate.generate(pipeline, PROMPTS)
    scores = [
        score(shapes.parse(prompt), shapes.read(image)) for prompt, image in zip(PROMPTS, images, strict=True)
    ]
    assert sum(one.colours for one in scores) >= 5
    assert sum(one.bound for one in scores) >= 5
    # The control: the same images against each other's prompts.
    others = [
        score(shapes.parse(prompt), shapes.read(image))
        for prompt, image in zip(PROMPTS, images[1:] + images[:1], strict=True)
    ]
    assert sum(one.colours for one in others) <= 1


def test_images_come_back_through_the_latents(pipeline):
    assert psnr(pipeline.vae, 7) > 35


def test_any_text_makes_an_image(pipeline):
    images = evaluate.generate(pipeline, ["", "Zürich 円", "x" * 300], steps=2)
    assert [image.size for image in images] == [(64, 64)] * 3


def test_the_evaluation_prints_the_bars_and_all_right_last(pipeline):
    printed = []
    columns = evaluate.evaluate(pipeline, 4, steps=2, report=printed.append)
    lines = printed[0].splitlines()
    assert lines[-1].startswith("all right")
    assert [line.split()[-1] for line in lines if line.startswith(("colours", "shapes", "colour bound"))] == [
        "98%",
        "95%",
        "95%",
    ]
    assert not lines[-2].endswith("%") or "90%" in lines[-2]
    assert {name: len(scores) for name, scores in columns.items()} == {"model": 4, "held out": 1, "reader": 4}
    assert all(one.all_right for one in columns["reader"])
