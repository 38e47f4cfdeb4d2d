"""The app on what is no pipeline of diffusers with words: loops of one's own, and models without prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError
from workbench.experiments.experiment import Experiment
from workbench.models.model import DiffusionModel
from workbench.widgets.app import Workbench

LONG = 120
REPOSITORY = Path(__file__).parents[2]


@contextmanager
def opened(model, **asked):
    bench = Workbench(model, **asked)
    try:
        yield bench
    finally:
        bench.close()


def in_words():
    """The pipeline of a tiny Stable Diffusion as a loop that somebody wrote."""
    pipeline = tiny.sd1()
    pipeline.set_progress_bar_config(disable=True)

    def denoise(prompt, num_inference_steps=4, guidance_scale=5.0, generator=None):
        embeds, negative = pipeline.encode_prompt(prompt, "cpu", 1, True)
        words = torch.cat([negative, embeds])
        shape = (1, pipeline.unet.config.in_channels, 8, 8)
        latents = torch.randn(shape, generator=generator) * pipeline.scheduler.init_noise_sigma
        pipeline.scheduler.set_timesteps(num_inference_steps)
        for t in pipeline.scheduler.timesteps:
            both = pipeline.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            with torch.no_grad():
                uncond, cond = pipeline.unet(both, t, encoder_hidden_states=words).sample.chunk(2)
            guided = uncond + guidance_scale * (cond - uncond)
            latents = pipeline.scheduler.step(guided, t, latents).prev_sample
        with torch.no_grad():
            pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(pixels)

    return wb.trace_loop(denoise, components=pipeline.components)


def without_words(answer):
    """The tutorial's first loop, of a fixed length; ``answer`` makes what it returns of the pixels."""
    pipeline = tiny.ddpm()

    def draw(generator=None):
        pipeline.scheduler.set_timesteps(3)
        size = pipeline.unet.config.sample_size
        sample = torch.randn((1, 3, size, size), generator=generator)
        for t in pipeline.scheduler.timesteps:
            with torch.no_grad():
                predicted = pipeline.unet(sample, t).sample
            sample = pipeline.scheduler.step(predicted, t, sample, generator=generator).prev_sample
        return answer(sample)

    return wb.trace_loop(draw, components={"unet": pipeline.unet, "scheduler": pipeline.scheduler})


def as_picture(sample):
    pixels = ((sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255).round().byte()
    return Image.fromarray(pixels.numpy())


def test_a_loop_runs_in_the_app_and_is_patched_as_a_pipeline_is():
    model = in_words()
    with opened(model, source="a red circle", target="a blue square", seed=1) as bench:
        assert bench.controls.model_name == "denoise"
        assert (bench.controls.steps, bench.controls.guidance) == (4, 5.0)
        pair = bench.run().result(LONG)
        # Another's, for the app's own may be under way, to learn how far another seed is.
        bare = in_words().pipeline("a blue square", generator=torch.Generator().manual_seed(1))["images"][0]
        assert as_bytes(pair.target.images[0]) == as_bytes(bare)
        assert pair.target.ledger.branches == ("uncond", "cond")
        assert [lane["label"] for lane in bench.scrubber.lanes] == ["source", "target"]
        assert bench.scrubber.attention["tokens"][1]["text"] == "a"
        cell = bench.patch("unet.mid_block", 0, "from here").result(LONG)
        assert "model = wb.trace_loop(denoise, components=components)" in bench.code.code
    patch = wb.Patch("unet.mid_block", source=pair.source, branch="cond")
    by_hand = in_words().record("a blue square", seed=1, interventions=[patch])
    assert as_bytes(cell.image) == as_bytes(by_hand.images[0]) != as_bytes(bare)


def test_the_code_of_a_loop_makes_the_picture_again(tmp_path):
    model = in_words()
    with opened(model, source="a red circle", target="a blue square", seed=1) as bench:
        bench.run().result(LONG)
        cell = bench.patch("unet.mid_block", 1, "half").result(LONG)
        path = bench.export("workbench", tmp_path / "again.py")
        with pytest.raises(InputError, match=r"loop of your own.*workbench"):
            bench.export("standalone")
    names = {"denoise": model.pipeline._function, "components": model.components}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert as_bytes(names["patched"].images[0]) == as_bytes(cell.image)


def test_without_words_two_noises_are_compared():
    model = without_words(as_picture)
    alone = {seed: model.record(seed=seed).images[0] for seed in (3, 4)}
    with opened(model, seed=3) as bench:
        controls = bench.controls
        assert not any((controls.can_prompt, controls.can_step, controls.can_guide))
        assert (controls.seed, controls.source_seed) == (3, 4)
        assert repr(controls) == "RunControls(seed=3, steps=20)"
        pair = bench.run().result(LONG)
        assert as_bytes(pair.source.images[0]) == as_bytes(alone[4])
        assert as_bytes(pair.target.images[0]) == as_bytes(alone[3])
        assert (bench.map.source_label, bench.map.target_label) == ("seed 4", "seed 3")
        assert bench.scrubber.kinds[0] == "predicted x₀"  # pixels are pictures, no decoder needed
        whole = bench.patch("unet.up_blocks.1", 0, "from here").result(LONG)
        assert whole.difference > 0
        controls.source_seed = 3
        same = bench.run().result(LONG)
        assert as_bytes(same.source.images[0]) == as_bytes(same.target.images[0])


def test_a_pipeline_without_words_goes_to_a_script_and_back(tmp_path):
    tiny.ddpm().save_pretrained(tmp_path / "ddpm")
    with opened(str(tmp_path / "ddpm"), steps=3, seed=5) as bench:
        bench.run().result(LONG)
        cell = bench.patch("unet.mid_block", 1, "from here").result(LONG)
        script = bench.export("standalone", tmp_path / "alone.py")
        saved = bench.export("experiment", tmp_path / "experiment.json")
    assert "workbench" not in script.read_text().replace("Diffusion Workbench", "")
    subprocess.run([sys.executable, script, "--out", tmp_path / "alone.png"], check=True, cwd=tmp_path)
    with Image.open(tmp_path / "alone.png") as alone:
        assert np.array_equal(np.asarray(alone), np.asarray(cell.image))
    again = Experiment.load(saved)
    assert (again.source, again.target, again.seed, again.source_seed) == (None, None, 5, 6)
    assert as_bytes(again.run().patched.images[0]) == as_bytes(cell.image)
    assert json.loads(saved.read_text())["source"] is None


def test_what_means_nothing_to_a_model_is_refused():
    model = without_words(as_picture)
    for asked, said in (
        ({"source": "a red circle"}, "draw takes no prompt.*source_seed"),
        ({"steps": 5}, "draw takes no num_inference_steps"),
        ({"guidance": 2.0}, "draw takes no guidance_scale"),
    ):
        with pytest.raises(InputError, match=said):
            Workbench(model, **asked)
    with pytest.raises(InputError, match=r"source_seed=2.*leaves the target's run"):
        Workbench(in_words(), source_seed=2, source_from=1)


@pytest.mark.parametrize("answer", [lambda sample: sample, lambda _: None, lambda sample: [sample]])
def test_a_loop_that_makes_no_picture_says_so(answer):
    with opened(without_words(answer)) as bench:
        job = bench.run()
        with pytest.raises(InputError, match="compares pictures"):
            job.result(LONG)
        assert bench.controls.error["title"] == "InputError"
        assert bench.source is None


def test_a_source_with_its_own_seed_beside_its_prompt():
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0}
    alone = DiffusionModel(tiny.sd1()).record("a red circle", seed=7, **settings)
    with opened(tiny.sd1(), steps=3, guidance=4.0, seed=1, source_seed=7) as bench:
        pair = bench.run().result(LONG)
        assert bench.map.source_label == "a red circle · seed 7"
    assert as_bytes(pair.source.images[0]) == as_bytes(alone.images[0])


def patch_the_joint_transformer(folder):
    """Run `shapes-mmdit` in the app; leave a patched picture and the script that makes it again."""
    with opened("shapes-mmdit", steps=4, guidance=3.0, seed=1) as bench:
        pair = bench.run().result(LONG)
        assert bench.experiment.arguments == {"max_sequence_length": 24}
        assert pair.target.ledger.branches == ("uncond", "cond")
        words = [each["text"] for each in bench.scrubber.attention["tokens"]]
        assert words.count("circle") == 1
        site = str(pair.map.sites[-1])
        cell = bench.patch(site, 0, "from here").result(LONG)
        assert cell.image.tobytes() != pair.target.images[0].tobytes()
        cell.image.save(folder / "patched.png")
        bench.export("standalone", folder / "alone.py")


def test_the_joint_transformer_that_is_shipped_in_the_app(tmp_path):
    # In a process of its own: in this one, what ran before decides on kernels, and so on last bits.
    code = "import pathlib, sys; from tests.widgets import test_app_kinds as here; "
    code += "here.patch_the_joint_transformer(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=REPOSITORY)
    hidden = "import runpy, sys; sys.modules['workbench'] = None; sys.argv = sys.argv[1:]"
    code = f"{hidden}; runpy.run_path(sys.argv[0])"
    out = tmp_path / "alone.png"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "alone.py"), "--out", str(out)],
        check=True,
        capture_output=True,
    )
    assert Image.open(out).tobytes() == Image.open(tmp_path / "patched.png").tobytes()
