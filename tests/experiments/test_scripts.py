"""Exported scripts make the bytes that the experiment made, whatever its prompts hold."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from tests import tiny
from workbench.errors import InputError
from workbench.experiments.changes import TurnSpec
from workbench.experiments.experiment import Experiment, Outcome
from workbench.experiments.scripts import workbench_code
from workbench.experiments.site_changes import AblateSpec, ModuleSpec, PatchSpec, ScaleSpec, SteerSpec
from workbench.experiments.standalone import standalone_code
from workbench.models.model import DiffusionModel
from workbench.tracing.sites import Site

REPOSITORY = Path(__file__).parents[2]
SHORT = """"'\n{x}\\'''\"""#"""
HOSTILE = [
    SHORT,
    "'''\"\"\"\\",
    "'); import os; os.abort(); ('",
    'a\r\n"""\nimport os\nos.abort()\n"""\n{__import__(\'os\')} %s {0} \x00\u2028\U0001f534',
]


@dataclass
class Script:
    """An experiment that ran here, and where its script and the script's picture are."""

    outcome: Outcome
    path: Path
    picture: Path


# Of each: the pipeline, its arguments, the patches, and the step at which the source leaves the target's run.
MASK = ((0.0, 1.0), (0.5, 1.0))
HIDDEN = "unet.mid_block.attentions.0.transformer_blocks.0"
CASES: dict[str, tuple[Any, dict[str, Any], tuple[Any, ...], int]] = {
    "sd1": (
        tiny.sd1,
        {},
        (
            PatchSpec(site="unet.mid_block", steps=(0, 1), branch="cond"),
            PatchSpec(site="unet.down_blocks.0:output[0]", steps=(-1,)),
            PatchSpec(site="unet.up_blocks.1:input", steps=(1,), branch="uncond"),
        ),
        0,
    ),
    "sd1 leaving": (
        tiny.sd1,
        {},
        (
            PatchSpec(site="unet.mid_block", steps=(0, 1), branch="cond"),
            PatchSpec(site="unet.down_blocks.0:output[0]", branch="cond"),
        ),
        1,
    ),
    "sd1 ablated": (
        tiny.sd1,
        {"guidance_scale": 3.0},
        (
            AblateSpec(site="unet.mid_block", steps=(0,), mask=MASK),
            AblateSpec(site="unet.down_blocks.0.resnets.0", how="noise", seed=4, branch="cond"),
            AblateSpec(site=HIDDEN, how="mean", references=("a cross", "a square"), steps=(1, 2)),
            AblateSpec(site="unet.up_blocks.0.resnets.0", how="resample", references=("a cross", "a dot")),
            ScaleSpec(site=f"{HIDDEN}.attn1:heads", factor=-2.0, mask=((1.0, 0.0, 0.0, 0.0),)),
        ),
        0,
    ),
    "sd1 steered": (
        tiny.sd1,
        {},
        (
            SteerSpec(
                site="unet.mid_block", pairs=(("a red cross", "a cross"),), branch="cond", strength=2.0
            ),
            SteerSpec(
                site=HIDDEN,
                pairs=(("a red cross", "a cross"), ("a red dot", "a dot")),
                method="pca",
                steps=(1,),
            ),
            ScaleSpec(site=f"{HIDDEN}.attn2.to_v", words=("circle",), factor=3.0, branch="cond"),
            PatchSpec(site=f"{HIDDEN}.attn2.to_k", words=("blue",), from_words=("red",), strength=0.5),
        ),
        0,
    ),
    "sd1 turning": (
        tiny.sd1,
        {"guidance_scale": 4.0},
        (
            PatchSpec(site="unet.mid_block", from_step=0, branch="cond", tokens=None),
            TurnSpec(step=1, prompt="a green dot"),
            TurnSpec(step=2, guidance_scale=9.0),
        ),
        0,
    ),
    "sd3": (
        tiny.sd3,
        {"max_sequence_length": 24},
        (PatchSpec(site="transformer.transformer_blocks.0:output[1]", branch="cond"),),
        0,
    ),
    "flux": (
        tiny.flux,
        {
            "height": 16,
            "width": 16,
            "max_sequence_length": 24,
            "true_cfg_scale": 3.0,
            "negative_prompt": "a cross",
        },
        (
            PatchSpec(site="transformer.transformer_blocks.0.ff", steps=(0, 2), branch="cond"),
            PatchSpec(site="transformer.single_transformer_blocks.0:output[1]", steps=(1,)),
        ),
        0,
    ),
    "flux leaving": (
        tiny.flux,
        {
            "height": 16,
            "width": 16,
            "max_sequence_length": 24,
            "true_cfg_scale": 3.0,
            "negative_prompt": "a cross",
        },
        (PatchSpec(site="transformer.transformer_blocks.0.ff", branch="cond"),),
        2,
    ),
}


def run_python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Run every experiment here, and every script in one other interpreter that has no workbench."""
    folder = tmp_path_factory.mktemp("scripts")
    made = {}
    for name, (build, given, patches, source_from) in CASES.items():
        build().save_pretrained(folder / name)
        arguments = dict(given)
        experiment = Experiment(
            model=str(folder / name),
            source=f"a red {SHORT}",
            target="a blue circle",
            seed=3,
            num_inference_steps=3,
            guidance_scale=arguments.pop("guidance_scale", None),
            arguments=arguments,
            interventions=patches,
            source_from=source_from,
        )
        outcome = experiment.run(DiffusionModel(str(folder / name)))
        made[name] = Script(outcome, folder / f"{name}.py", folder / f"{name}.png")
        code = standalone_code(experiment, outcome.source, outcome.target)
        made[name].path.write_text(code, encoding="utf-8")
    run_python(
        "import runpy, sys\n"
        "sys.modules['workbench'] = None\n"
        "for path in sys.argv[1:]:\n"
        "    sys.argv = [path, '--out', path.replace('.py', '.png')]\n"
        "    runpy.run_path(path, run_name='__main__')\n"
        "assert not [name for name in sys.modules if name.startswith('workbench.')]\n",
        *(each.path for each in made.values()),
    )
    return made


@pytest.mark.parametrize("name", list(CASES))
def test_standalone_script_makes_the_same_bytes(scripts, name):
    outcome, picture = scripts[name].outcome, Image.open(scripts[name].picture)
    assert picture.tobytes() == outcome.patched.images[0].tobytes()
    assert picture.tobytes() != outcome.target.images[0].tobytes()
    assert picture.tobytes() != outcome.source.images[0].tobytes()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("sd1")])
def test_workbench_code_makes_the_same_bytes(scripts, tmp_path, name):
    outcome = scripts[name].outcome
    run_python(
        "import sys\n"
        "names = {}\n"
        "exec(compile(sys.argv[1], 'exported', 'exec'), names)\n"
        "patched = names['patched'] if 'patched' in names else names['outcome'].patched\n"
        "patched.images[0].save(sys.argv[2])\n",
        workbench_code(outcome.experiment),
        tmp_path / "image.png",
    )
    assert Image.open(tmp_path / "image.png").tobytes() == outcome.patched.images[0].tobytes()


@pytest.mark.parametrize("prompt", HOSTILE)
@pytest.mark.parametrize("kind", ["workbench", "standalone"])
def test_prompt_stays_a_string_whatever_it_holds(scripts, prompt, kind):
    outcome = scripts["sd1"].outcome
    plain, hostile = (
        outcome.experiment.model_copy(
            update={"source": text, "target": text + "!", "arguments": {"negative_prompt": text}}
        )
        for text in ("plain", prompt)
    )
    trees = []
    for experiment in (plain, hostile):
        code = (
            workbench_code(experiment)
            if kind == "workbench"
            else standalone_code(experiment, outcome.source, outcome.target)
        )
        trees.append(ast.parse(code.encode()))
    texts = [node.value for node in ast.walk(trees[1]) if isinstance(node, ast.Constant)]
    assert {prompt, prompt + "!"} <= {text for text in texts if isinstance(text, str)}
    # But for the strings the two scripts are the same program.
    shapes = [[type(node).__name__ for node in ast.walk(tree)] for tree in trees]
    assert shapes[0] == shapes[1]


def test_without_patches_the_script_is_the_target_alone(scripts):
    outcome = scripts["sd1"].outcome
    plain = outcome.experiment.model_copy(update={"interventions": ()})
    code = standalone_code(plain, outcome.source, outcome.target)
    assert "generate(**TARGET).save(options.out)" in code
    assert "CHANGES" not in code
    assert workbench_code(plain).endswith("target.images[0]\n")
    ast.parse(code)


def test_model_made_in_memory_cannot_be_exported_alone():
    experiment = Experiment(
        source="a", target="a red", num_inference_steps=1, interventions=(PatchSpec(site="unet.mid_block"),)
    )
    outcome = experiment.run(DiffusionModel(tiny.sd1()))
    with pytest.raises(InputError, match="save_pretrained"):
        standalone_code(experiment, outcome.source, outcome.target)
    assert "wb.DiffusionModel(pipeline)" in workbench_code(experiment)


@pytest.mark.parametrize(
    "site", ["unet.mid_block.attentions.0.transformer_blocks.0.attn2:probs", "unet:inputs"]
)
def test_a_site_that_plain_hooks_do_not_reach_is_not_exported_alone(site):
    model = DiffusionModel("shapes-unet")
    runs = [
        model.record(prompt, num_inference_steps=2, seed=0) for prompt in ("a red circle", "a blue circle")
    ]
    experiment = Experiment(
        model="shapes-unet",
        source="a red circle",
        target="a blue circle",
        num_inference_steps=2,
        interventions=(PatchSpec(site=site, steps=(1,)),),
    )
    with pytest.raises(InputError, match="format='workbench'"):
        standalone_code(experiment, *runs)
    assert str(Site.parse(site)) in workbench_code(experiment)


def test_what_an_experiment_imports_is_exported_only_for_those_who_trust_it(scripts):
    outcome = scripts["sd1"].outcome
    imports = ModuleSpec(site="unet.mid_block", module="os:system", arguments={"command": "true"})
    experiment = outcome.experiment.model_copy(update={"interventions": (imports,)})
    with pytest.raises(InputError, match=r"os:system.*allow_code"):
        standalone_code(experiment, outcome.source, outcome.target)
    assert "allow_code" not in workbench_code(experiment)
    assert "allow_code=True" in workbench_code(experiment, allow_code=True)


def test_source_of_another_model(tmp_path, scripts):
    folder = scripts["sd1"].path.with_suffix("")
    other = tiny.sd1()
    torch.nn.init.normal_(other.unet.conv_in.weight, generator=torch.Generator().manual_seed(9))
    other.save_pretrained(tmp_path / "other")
    experiment = Experiment(
        model=str(folder),
        source_model=str(tmp_path / "other"),
        source="a red circle",
        target="a blue circle",
        num_inference_steps=2,
        interventions=(PatchSpec(site="unet.mid_block", branch="cond"),),
    )
    outcome = experiment.run()
    code = standalone_code(experiment, outcome.source, outcome.target)
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    run_python(
        "import runpy, sys\nsys.modules['workbench'] = None\nsys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n",
        tmp_path / "script.py",
        "--out",
        tmp_path / "image.png",
    )
    assert Image.open(tmp_path / "image.png").tobytes() == outcome.patched.images[0].tobytes()
    assert outcome.patched.images[0].tobytes() != outcome.target.images[0].tobytes()


def test_a_script_opens_the_model_as_it_is_open_here(tmp_path, scripts):
    folder = scripts["sd1"].path.with_suffix("")
    model = DiffusionModel(str(folder))
    config = {**model.pipeline.scheduler.config, "lambda_min_clipped": float("-inf")}
    model.pipeline.scheduler = DDIMScheduler.from_config(config, beta_end=0.02)
    experiment = scripts["sd1"].outcome.experiment
    outcome = experiment.run(model)
    assert outcome.patched.images[0].tobytes() != scripts["sd1"].outcome.patched.images[0].tobytes()
    experiment.export(tmp_path / "alone.py", model=model)
    experiment.export(tmp_path / "with.py", "workbench", model=model)
    alone = "import runpy, sys; sys.modules['workbench'] = None; sys.argv = sys.argv[1:]"
    run_python(
        f"{alone}; runpy.run_path(sys.argv[0])", tmp_path / "alone.py", "--out", tmp_path / "alone.png"
    )
    beside = "import runpy, sys\nrunpy.run_path(sys.argv[1])['patched'].images[0].save(sys.argv[2])\n"
    run_python(beside, tmp_path / "with.py", tmp_path / "with.png")
    for name in ("alone", "with"):
        assert Image.open(tmp_path / f"{name}.png").tobytes() == outcome.patched.images[0].tobytes()
        loaded = Experiment.load(tmp_path / f"{name}.py")
        assert loaded.run().patched.images[0].tobytes() == outcome.patched.images[0].tobytes()
    assert workbench_code(loaded).count("from_config") == 1
    data = workbench_code(loaded.model_copy(update={"weights": "sha256:" + "0" * 64}), model)
    assert "'name': 'DDIMScheduler'" in data
    assert "from_config" not in data
