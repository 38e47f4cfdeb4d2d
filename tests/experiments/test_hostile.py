"""Files that are no experiments, made by hand and by chance: one named error each, and nothing runs."""

import json
import random
import time

import pytest

from workbench.cli.main import main
from workbench.errors import InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.spec import FORMAT

WHOLE = {
    "format": FORMAT,
    "model": "shapes-unet",
    "source": "a red circle",
    "target": "a blue circle",
    "seed": 3,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "arguments": {"eta": 0.0},
    "interventions": [
        {"kind": "patch", "site": "unet.mid_block", "steps": [0, 1], "branch": "cond"},
        {"kind": "steer", "site": "unet.conv_in", "pairs": [["a", "b"]], "strength": 2.0},
        {"kind": "turn", "step": 2, "prompt": "a cross"},
    ],
    "forks": [{"step": 3, "guidance_scale": 1.0}],
}
PATCH = WHOLE["interventions"][0]


def changed(**changes):
    return json.dumps({**WHOLE, **changes})


def patched(**changes):
    return changed(interventions=[{**PATCH, **changes}])


def steered(direction):
    told = {"kind": "steer", "site": "unet.conv_in", "direction": "DIRECTION"}
    text = direction if isinstance(direction, str) else json.dumps(direction)
    return changed(interventions=[told]).replace('"DIRECTION"', text)


BY_HAND = [
    "",
    " ",
    "null",
    "true",
    "1",
    "[]",
    '"experiment"',
    "{",
    "{}}",
    "NaN",
    "\x00",
    "{'source': 1}",
    json.dumps(WHOLE)[:-1],
    json.dumps(WHOLE)[: len(json.dumps(WHOLE)) // 2],
    json.dumps(WHOLE) * 2,
    "[" * 100_000,
    '{"a":' * 50_000,
    changed(format=0),
    changed(format=FORMAT + 1),
    changed(format="2"),
    changed(format=None),
    changed(model=7),
    changed(source=None),
    changed(source=["a"]),
    changed(seed="three"),
    changed(seed=1.5),
    changed(num_inference_steps=0),
    changed(guidance_scale=float("nan")),
    changed(guidance_scale=float("inf")),
    changed(arguments=[]),
    changed(weights="sha256:short"),
    changed(interventions={}),
    changed(interventions=[None]),
    changed(interventions=[[]]),
    changed(nothing="of ours"),
    changed(forks=[{"step": 1}]),
    changed(forks=[{"step": 3, "prompt": "a", "forks": [{"step": 2, "prompt": "b"}]}]),
    patched(kind="patchh"),
    patched(site="../../etc/passwd"),
    patched(site="unet.mid_block:__class__"),
    patched(steps=["one"]),
    patched(strength=float("inf")),
    patched(mask=[[0, 1], [0]]),
    patched(branch=""),
    changed(num_inference_steps=10**12),
    changed(arguments={"num_inference_steps": 7}),
    changed(arguments={"self": 1}),
    changed(arguments={"output_type": "latent"}),
    changed(interventions=[{"kind": "turn", "step": 1, "arguments": {"capture": []}}]),
    changed(forks=[{"step": 3, "arguments": {"listener": 1}}]),
    changed(interventions=[{"kind": "ablate", "site": "unet.conv_in", "how": "noise", "seed": 1 << 60}]),
    changed(interventions=[{"kind": "corrupt", "seed": -1}]),
    steered([[1.0], [1.0, 2.0]]),
    steered("[" * 70 + "1" + "]" * 70),
    steered([0] * 3_000_000),
    changed(interventions=[PATCH] * 30_000),
    changed(interventions=[0] * 3_000_000),
    changed(**{f"field{number}": 0 for number in range(100_000)}),
    patched(site="unet." + "x" * 1_000_000),
    patched(steps=[0] * 1_000_000),
    patched(steps=["x"] * 1_000_000),
    patched(mask=[[0.5] * 2000] * 2000),
]
"""Some are of megabytes: they are refused as soon as the others."""


@pytest.mark.parametrize("text", BY_HAND, ids=range(len(BY_HAND)))
def test_what_was_made_wrong_by_hand_is_one_named_error(tmp_path, capsys, text):
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(InputError, match="is no experiment") as caught:
        Experiment.load(tmp_path / "experiment.json")
    assert len(str(caught.value)) < 2000
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "experiment.json"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def mutated(chance):
    """Return an experiment's file with a few bytes changed, cut off, doubled or moved."""
    data = bytearray(json.dumps(WHOLE, indent=1).encode())
    for _ in range(chance.randint(1, 4)):
        at, what = chance.randrange(len(data)), chance.randrange(5)
        if what == 0:
            data[at] = chance.randrange(256)
        elif what == 1:
            del data[max(at, 1) : at + chance.randint(1, 40)]
        elif what == 2:
            data[at:at] = data[chance.randrange(len(data)) :][: chance.randint(1, 60)]
        elif what == 3:
            data[at:at] = chance.choice([b"null", b"1e999", b"-1", b"{}", b"[]", b'"\\ud800"', b"NaN"])
        else:
            del data[max(at, 1) :]
    return bytes(data)


def test_a_thousand_mutations_are_experiments_or_one_named_error_each(tmp_path):
    chance, refused = random.Random(0), 0
    path = tmp_path / "experiment.json"
    for _ in range(1000):
        path.write_bytes(mutated(chance))
        try:
            assert isinstance(Experiment.load(path), Experiment)
        except InputError:
            refused += 1
    assert refused > 800


FITTING = [
    (changed(model="~nobody/there"), "nobody"),
    (changed(model="shapes-unet\x00"), "shapes-unet"),
    (changed(picture="\x00.png", source_from=0), "picture"),
    (changed(arguments={"height": 7, "width": 7}), "The run ended with ValueError"),
    (patched(site="unet.nowhere"), "nowhere"),
    (patched(steps=[9]), "9 is none of them"),
    (changed(interventions=[{"kind": "scale", "site": "unet.nowhere", "factor": 2.0}]), "nowhere"),
    (changed(interventions=[{"kind": "module", "site": "unet.conv_in", "module": "os:abort"}]), "allow_code"),
]


@pytest.mark.parametrize(("text", "said"), FITTING, ids=range(len(FITTING)))
def test_what_only_the_model_can_refuse_is_refused_before_anything_runs(tmp_path, capsys, text, said):
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "experiment.json"), "--out", str(tmp_path / "out")])
    told = capsys.readouterr()
    assert ended.value.code == (1 if "ended with" in said else 2)  # of what a pipeline raises: 1
    assert said in told.err.splitlines()[-1]
    assert "Traceback" not in told.err
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(changed())
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "experiment.json"), "--out", str(tmp_path / "experiment.json")])
    assert "cannot be written" in capsys.readouterr().err


def test_scripts_that_carry_none_are_refused(tmp_path):
    texts = {"a.py": "print(1)", "a.ipynb": "{}", "b.ipynb": '{"cells": [1]}', "c.ipynb": "["}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="is no experiment"):
            Experiment.load(tmp_path / name)


def test_a_file_too_large_to_be_one_is_not_read(tmp_path):
    with (tmp_path / "experiment.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="more than 8 MiB"):
        Experiment.load(tmp_path / "experiment.json")


@pytest.mark.parametrize(
    "changes",
    [
        [{**PATCH, "steps": None, "tokens": [place]} for place in range(1000)],
        [{**PATCH, "steps": list(range(1000)), "tokens": [place]} for place in range(300)],
    ],
)
def test_many_changes_of_one_place_are_compared_in_no_time(changes):
    text = json.dumps({"source": "a", "target": "b", "interventions": changes})
    start = time.process_time()
    Experiment.read(text, "many.json")
    assert time.process_time() - start < 1


def test_what_is_wrong_is_said_in_a_few_words():
    with pytest.raises(InputError) as caught:
        Experiment.read(changed(**{"x" * 1_000_000: 1}), "long.json")
    assert len(str(caught.value)) < 1000
