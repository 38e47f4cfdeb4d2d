import numpy as np
import pytest
import torch

from tests import tiny
from workbench.errors import InputError, UnknownNameError
from workbench.models.arguments import check, count_images, count_prompts

LONG = "a red circle " * 10


@pytest.fixture(scope="module", params=["sd1", "sd3", "flux", "pixart", "wan"])
def pipeline(request):
    return tiny.CASES[request.param].build()


@pytest.fixture(scope="module")
def sd1():
    return tiny.sd1()


def test_what_the_pipeline_takes_is_taken(pipeline):
    check(pipeline, {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 3.0})
    check(pipeline, {"prompt": ["a red circle", "a blue square"], "height": 16})


@pytest.mark.parametrize(("name", "near"), [("guidence_scale", "guidance_scale"), ("promt", "prompt")])
def test_a_misspelt_argument_names_the_nearest_even_where_the_pipeline_would_swallow_it(pipeline, name, near):
    with pytest.raises(UnknownNameError, match=f"takes no '{name}'.*'{near}'"):
        check(pipeline, {"prompt": "a red circle", name: 1})


def test_control_this_pipeline_swallows_what_it_does_not_know(sd1):
    sd1("a red circle", num_inference_steps=1, guidence_scale=3.0)


def test_what_old_pipelines_take_beside_their_signature_is_taken(sd1):
    check(sd1, {"prompt": "a red circle", "callback": print, "callback_steps": 1})


def test_a_pipeline_of_somebody_elses_may_take_any_argument():
    class Custom(type(tiny.sd1())):
        def __call__(self, prompt=None, **kwargs):
            return kwargs

    custom = Custom(**tiny.sd1().components, requires_safety_checker=False)
    check(custom, {"prompt": "a red circle", "my_own": 1})


@pytest.mark.parametrize("prompt", ["", "   ", "\n", [""], ["a red circle", ""]])
def test_an_empty_prompt_is_refused(pipeline, prompt):
    with pytest.raises(InputError, match="The prompt is empty"):
        check(pipeline, {"prompt": prompt})


def test_a_missing_prompt_is_refused(sd1):
    with pytest.raises(InputError, match="StableDiffusionPipeline needs a prompt"):
        check(sd1, {})
    check(tiny.ddpm(), {})


@pytest.mark.parametrize("prompt", [3, ["a red circle", 3], b"a red circle"])
def test_a_prompt_that_is_no_text_is_refused(pipeline, prompt):
    with pytest.raises(InputError, match="A prompt is text"):
        check(pipeline, {"prompt": prompt})


def test_an_overlong_prompt_is_refused_with_where_it_would_stop(sd1):
    with pytest.raises(InputError, match=r"has 32 tokens; the model reads 24\..*stop after.*circle.*Shorten"):
        check(sd1, {"prompt": LONG})
    with pytest.raises(InputError, match="tokens"):
        check(sd1, {"prompt": ["a red circle", LONG]})
    check(sd1, {"prompt": "a red circle " * 7})


def test_of_several_encoders_the_longest_reader_counts():
    pipeline = tiny.sd3()
    pipeline.tokenizer_3.model_max_length = 64
    check(pipeline, {"prompt": LONG})
    with pytest.raises(InputError, match="the model reads 16"):
        check(pipeline, {"prompt": LONG, "max_sequence_length": 16})


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4", True])
def test_steps_that_are_no_positive_number_are_refused(pipeline, steps):
    with pytest.raises(InputError, match="num_inference_steps="):
        check(pipeline, {"prompt": "a red circle", "num_inference_steps": steps})


@pytest.mark.parametrize(
    ("arguments", "prompts", "images"),
    [
        ({}, 1, 1),
        ({"prompt": "a"}, 1, 1),
        ({"prompt": ["a", "b"]}, 2, 1),
        ({"prompt": "a", "num_images_per_prompt": 3}, 1, 3),
        ({"prompt": "a", "num_videos_per_prompt": 2}, 1, 2),
        ({"class_labels": [1, 2, 3]}, 3, 1),
        ({"batch_size": 4}, 4, 1),
        ({"image": [tiny.picture()] * 2}, 2, 1),
        ({"prompt": "a", "image": [tiny.picture()] * 2}, 1, 1),
        ({"prompt_embeds": torch.zeros(2, 8, 4)}, 2, 1),
        ({"prompt_embeds": [torch.zeros(8, 4), torch.zeros(5, 4)]}, 2, 1),
        ({"image_embeds": torch.zeros(2, 4)}, 2, 1),
        ({"image_embeds": [torch.zeros(1, 4), torch.zeros(2, 4)]}, 3, 1),
        ({"image": torch.zeros(2, 3, 16, 16)}, 2, 1),
        ({"image": np.zeros((3, 16, 16, 3))}, 3, 1),
        ({"image": torch.zeros(3, 16, 16)}, 1, 1),
        ({"prompt": "a", "image": torch.zeros(2, 3, 16, 16)}, 1, 1),
    ],
)
def test_prompts_and_images_are_counted(arguments, prompts, images):
    assert (count_prompts(arguments), count_images(arguments)) == (prompts, images)
