"""The command line, in this process and, once, in one of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import workbench as wb
from tests import tiny
from workbench.cli.main import main
from workbench.cli.table import size
from workbench.models.model import DiffusionModel

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.sd1().save_pretrained(folder)
    return str(folder)


def command(capsys, *arguments):
    """Run a command; return its exit status, output and errors."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_record_and_info(capsys, pipeline, tmp_path):
    out = tmp_path / "run"
    asked = (
        "--out",
        out,
        "--capture",
        "unet.mid_block",
        "--capture",
        "unet.conv_in:input",
        "--seed",
        3,
        "--steps",
        2,
    )
    status, said, _ = command(capsys, "record", pipeline, "a red circle", *asked)
    assert (status, said.split(":")[1].strip()) == (0, "2 steps, 2 calls")
    record = wb.load_record(out)
    assert (record.spec.seed, record.spec.arguments["num_inference_steps"]) == (3, 2)
    assert record["unet.mid_block"].shape[0] == 2

    for path in out.glob("data-*/*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))  # no tensor can be read
    status, said, _ = command(capsys, "info", out)
    assert status == 0
    lines = [line.split() for line in said.splitlines()]
    assert ["unet.mid_block", "2", "2×16×4×4", "float32", "4.1", "kB"] in lines
    assert ["latents", "2", "1×4×8×8", "float32", "2.0", "kB"] in lines
    assert ["output", "1", "16×16", "RGB", "image", "768", "B"] in lines
    assert "prompt     a red circle" in said


def test_info_of_a_data_set(capsys, tmp_path):
    stream = wb.Stream(tmp_path / "data", ["unet.mid_block"], dtype="float16")
    for _ in range(2):
        DiffusionModel(tiny.sd1()).record("a red circle", num_inference_steps=2, capture=[stream])
    status, said, _ = command(capsys, "info", tmp_path / "data")
    assert status == 0
    assert said.startswith("data set of activations: 2 runs in 2 shards")
    assert ["unet.mid_block", "8", "16×4×4", "float16"] in [line.split() for line in said.splitlines()]


def test_our_errors_are_one_line_and_status_2(capsys, pipeline, tmp_path):
    for arguments, message in [
        (("info", tmp_path / "nowhere"), "is not there"),
        (("record", "shapes-unt", "a red circle", "--out", tmp_path / "x"), "Did you mean 'shapes-unet'"),
        (("record", pipeline, "", "--out", tmp_path / "x"), "The prompt is empty"),
        (("record", pipeline, "a red circle", "--out", tmp_path / "x", "--steps", 0), "at least 1"),
        (
            ("record", pipeline, "a red circle", "--out", tmp_path / "x", "--capture", "unet.mid"),
            "unet.mid_block",
        ),
    ]:
        status, said, errors = command(capsys, *arguments)
        assert (status, said) == (2, "")
        ours = [line for line in errors.splitlines() if line.startswith("workbench: ")]
        assert len(ours) == 1
        assert message in ours[0]
    assert not (tmp_path / "x").exists()


def test_a_misused_command_says_how_it_is_used(capsys):
    status, _, errors = command(capsys, "record", "shapes-unet")
    assert status == 2
    assert "Missing" in errors
    assert command(capsys, "info", "here", "--nonsense")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["record", "info"]),
        (("record",), ["MODEL", "PROMPT", "--out", "--capture", "--seed", "--steps", "Example"]),
        (("info",), ["FOLDER", "data set"]),
    ],
)
def test_help_is_helpful(capsys, arguments, words):
    status, said, _ = command(capsys, *arguments, "--help")
    assert status == 0
    assert all(word in said for word in words)


def test_help_loads_no_torch():
    code = (
        "import atexit, sys; sys.argv = ['workbench', '--help'];"
        "atexit.register(lambda: print('torch' in sys.modules));"
        "from workbench.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Usage: workbench" in done.stdout
    assert done.stdout.split()[-1] == "False"


def test_the_console_script_is_this_command():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"workbench": "workbench.cli.main:main"}


def test_sizes_are_spelled():
    assert [size(n) for n in (0, 999, 4096, 2_500_000, 3 * 10**9)] == [
        "0 B",
        "999 B",
        "4.1 kB",
        "2.5 MB",
        "3.0 GB",
    ]


def small(pipeline, **changes):
    given = {"source": "a red square", "target": "a blue circle", "num_inference_steps": 2, **changes}
    return wb.Experiment(model=pipeline, **given)


PATCH = {"kind": "patch", "site": "unet.mid_block", "steps": [1]}


def test_an_experiment_is_run_exported_and_read_back(capsys, pipeline, tmp_path):
    experiment = small(pipeline, interventions=[PATCH], forks=[{"step": 1, "prompt": "a cross"}])
    file = experiment.save(tmp_path / "experiment.json")
    status, said, _ = command(capsys, "run", file, "--out", tmp_path / "out", "--records")
    assert status == 0
    assert "towards the source" in said
    made = {path.name for path in (tmp_path / "out").iterdir()}
    runs = ("source", "target", "patched", "branch-0")
    assert made == {name for run in runs for name in (f"{run}.png", f"{run}-record")}
    outcome = experiment.run()
    for name, record in (("patched", outcome.patched), ("branch-0", outcome.branches[0].record)):
        assert Image.open(tmp_path / "out" / f"{name}.png").tobytes() == record.images[0].tobytes()
    status, said, _ = command(
        capsys, "show", tmp_path / "out" / "patched-record", "--out", tmp_path / "p.html"
    )
    assert (status, said.strip()) == (0, str(tmp_path / "p.html"))
    assert "<html" in (tmp_path / "p.html").read_text()[:200]
    for name, kind in (
        ("a.py", ["--workbench"]),
        ("b.py", []),
        ("c.ipynb", ["--workbench"]),
        ("d.ipynb", []),
    ):
        assert command(capsys, "export", file, "--out", tmp_path / name, *kind)[0] == 0
        assert wb.Experiment.load(tmp_path / name) == experiment
    subprocess.run(
        [sys.executable, tmp_path / "b.py", "--out", tmp_path / "b.png"], capture_output=True, check=True
    )
    assert Image.open(tmp_path / "b.png").tobytes() == outcome.patched.images[0].tobytes()
    status, _, wrong = command(capsys, "export", file, "--out", tmp_path / "a.txt")
    assert status == 2
    assert "neither a script nor a notebook" in wrong


def test_a_sweep_writes_its_map_and_says_where_it_is_highest(capsys, pipeline, tmp_path):
    file = small(pipeline).save(tmp_path / "experiment.json")
    sites = ("--site", "unet.mid_block", "--site", "unet.conv_in")
    asked = ("--out", tmp_path / "map", *sites, "--seeds", 2)
    status, said, _ = command(capsys, "sweep", file, *asked)
    assert status == 0
    assert "2 sites × 2 steps × 2 seeds" in said
    rows = (tmp_path / "map" / "map.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2
    assert command(capsys, "sweep", file, *asked)[0] == 0
    assert (tmp_path / "map" / "map.csv").read_text().splitlines() == rows


def test_a_sweep_has_axes_and_metrics_with_arguments_and_is_exported(capsys, pipeline, tmp_path):
    file = small(pipeline).save(tmp_path / "experiment.json")
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    words = ("--site", f"{site}.to_v", "--words", "red -> blue", "--words", "red -> blue + square -> circle")
    asked = ("--step", 1, "--branch", "cond", "--branch", "all", "--seeds", 1)
    measured = ("--metric", "pixel", "--metric", "pixel:source")
    status, said, _ = command(capsys, "sweep", file, "--out", tmp_path / "map", *words, *asked, *measured)
    assert status == 0
    assert "1 sites × 1 steps × 2 branches × 2 words × 1 seeds" in said
    assert "words red -> blue" in said
    header, *rows = (tmp_path / "map" / "map.csv").read_text().splitlines()
    assert {"words", "branch", "pixel", "pixel:source"} <= set(header.split(","))
    assert len(rows) == 4
    heads = ("--site", f"{site}:heads", "--heads", 0, "--heads", "0+1", *asked)
    for name, kind, both in (("a.py", "--standalone", "'0 + 1'"), ("b.py", "--workbench", "(0, 1)")):
        status, said, _ = command(capsys, "sweep", file, "--script", tmp_path / name, kind, *heads)
        assert (status, said.strip()) == (0, str(tmp_path / name))
        assert both in (tmp_path / name).read_text()
        assert wb.Experiment.load(tmp_path / name).target == "a blue circle"
    for wrong, told in (
        (("--heads", "x"), "--heads 'x'"),
        (("--metric", "towards:x"), "towards takes nothing"),
        (("--metric", "colour:wanted=red,size=3"), "takes wanted=…, shape=…"),
        ((), "--out FOLDER"),
    ):
        to = ("--out", tmp_path / "no") if wrong else ()
        status, _, said = command(capsys, "sweep", file, *to, "--site", site, *wrong)
        assert status == 2
        assert told in said


def test_a_sweep_counts_its_failures_and_fails_if_all_did(capsys, pipeline, tmp_path):
    file = small(pipeline).save(tmp_path / "experiment.json")
    site = ("--site", "unet.mid_block.attentions.0.transformer_blocks.0.attn2:heads", "--step", 1)
    asked = ("--out", tmp_path / "some", *site, "--heads", 0, "--heads", 9, "--seeds", 2)
    status, said, _ = command(capsys, "sweep", file, *asked)
    assert status == 0
    assert "2 of 4 cells failed, the first with: " in said
    assert "2 of 4 random controls failed" in said
    assert "nan" not in said
    asked = ("--out", tmp_path / "all", *site, "--heads", 9, "--seeds", 2)
    status, said, wrong = command(capsys, "sweep", file, *asked)
    assert status == 1
    assert "All 2 cells failed, the first with: " in wrong
    assert "nan" not in said
    assert "2 of 2 cells" in command(capsys, "sweep", file, *asked)[2]
    assert "0 of 2 cells" in command(capsys, "sweep", file, *asked, "--retry")[2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"clip_skip": 99}, "IndexError"), ({"cross_attention_kwargs": 5}, "AttributeError")],
)
def test_what_a_pipeline_raises_is_one_line_and_status_1(capsys, pipeline, tmp_path, arguments, told):
    file = small(pipeline, arguments=arguments, interventions=[PATCH]).save(tmp_path / "experiment.json")
    for name, *further in (
        ("run", "--out", tmp_path / "out"),
        ("sweep", "--out", tmp_path / "out"),
        ("sweep", "--out", tmp_path / "out", "--site", "unet.mid_block"),
        ("export", "--out", tmp_path / "a.py"),
    ):
        status, _, wrong = command(capsys, name, file, *further)
        assert status == 1
        last = wrong.splitlines()[-1]
        assert last.startswith("workbench: The ")
        assert f" ended with {told}: " in last


def test_models_are_listed_and_the_components_of_one(capsys):
    status, said, _ = command(capsys, "models")
    assert status == 0
    assert {line.split()[0] for line in said.splitlines()} == set(wb.zoo.models())
    status, said, _ = command(capsys, "models", "shapes-unet")
    assert status == 0
    named = {line.split()[0]: line.split()[1] for line in said.splitlines()}
    assert named["unet"] == "UNet2DConditionModel"
    status, _, wrong = command(capsys, "models", "shapes-unett")
    assert status == 2
    assert "shapes-unet" in wrong


def test_the_demonstration_patches_a_colour(capsys, tmp_path):
    status, said, _ = command(capsys, "demo", "--out", tmp_path)
    assert status == 0
    assert int(said.split("source: ")[1].split("%")[0]) > 50
    assert wb.Experiment.load(tmp_path / "experiment.json").model == "shapes-unet"
    read = [wb.zoo.shapes.read(Image.open(tmp_path / f"{name}.png")) for name in ("target", "patched")]
    assert [each.things[0].colour for each in read] == ["blue", "red"]


def test_code_in_an_experiment_needs_leave(capsys, pipeline, tmp_path):
    code = {"kind": "module", "site": "unet.mid_block", "module": "torch:tanh"}
    file = small(pipeline, interventions=[code]).save(tmp_path / "experiment.json")
    status, _, wrong = command(capsys, "run", file, "--out", tmp_path / "out")
    assert status == 2
    assert "'torch:tanh'" in wrong
    assert command(capsys, "run", file, "--out", tmp_path / "out", "--allow-code")[0] == 0
