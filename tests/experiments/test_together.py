"""Forks as rows of one run: what each becomes, and what cannot go together."""

from dataclasses import replace

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, forwards_of
from workbench.errors import InputError
from workbench.experiments.editing import TakeLatents
from workbench.experiments.together import evenly, fork_rows, goes_together
from workbench.interventions.attention import ForceMap, Reweight
from workbench.interventions.control import RandomDirection
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.rows import joined, separate

NAMES = ("sd1", "sdxl", "sd3", "flux-cfg", "pixart", "wan22", "dit", "animatediff", "ddpm")
CASES = [pytest.param(tiny.FAMILIES[name], id=name) for name in NAMES if name in tiny.FAMILIES]
SITE = "unet.mid_block"


def apart(one, other):
    """How far two runs' latents are, of the largest."""
    return float((one.latents - other.latents).abs().max() / other.latents.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_rows_become_what_forks_of_their_own_become(case):
    model = DiffusionModel(case.build())
    source = model.record(**case.arguments, seed=1, capture=[case.site])
    targets = [model.record(**case.arguments, seed=seed) for seed in (0, 0, 2)]
    last = targets[0].ledger.steps - 1
    patch = Patch(case.site, source=source, steps=last)
    changes = [[patch], [], [RandomDirection.of(patch, 3)]]
    rows = fork_rows(targets, changes, last)
    alone = [each.fork(last, interventions=own) for each, own in zip(targets, changes, strict=True)]
    assert [apart(row, one) <= 1e-5 for row, one in zip(rows, alone, strict=True)] == [True] * 3
    assert apart(rows[0], rows[1]) > 1e-4
    assert goes_together(targets[0])


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, prompt="a red circle", seed=0, **asked):
    return model.record(prompt, seed=seed, num_inference_steps=4, capture=[SITE], **asked)


def test_one_row_is_a_fork_to_the_byte(model):
    source, target = run(model, "a green cross"), run(model)
    patch = Patch(SITE, source=source, steps=2)
    (row,) = fork_rows([target], [[patch]], 2)
    assert as_bytes(row.latents) == as_bytes(target.fork(2, interventions=[patch]).latents)


class Full:
    """A listener that has memory for so many rows."""

    def __init__(self, rows):
        self.rows, self.refused = rows, 0

    def started(self, row):
        if row.samples > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError(f"no room for {row.samples}")

    def ticked(self, tick, latents):
        pass


def test_where_memory_does_not_do_for_all_fewer_go_together():
    model = DiffusionModel(tiny.sd1())
    source, target = run(model, "a green cross"), run(model)
    changes = [[Patch(SITE, source=source, steps=step)] for step in (2, 3, 2, 3, 2)]
    full = Full(2)
    rows = fork_rows([target] * 5, changes, 2, listener=full)
    assert full.refused == 1  # what there is room for is known from then on
    alone = [target.fork(2, interventions=own) for own in changes]
    assert max(apart(row, one) for row, one in zip(rows, alone, strict=True)) <= 1e-5
    with pytest.raises(torch.OutOfMemoryError):
        fork_rows([target] * 3, changes[:3], 2, listener=Full(0))


def test_edits_of_attention_are_a_rows_own(model):
    target = run(model)
    layer = f"{SITE}.attentions.0.transformer_blocks.0.attn2"
    edits = [
        Reweight(layer, words={"red": 6.0}),
        ForceMap(layer, word="circle", map=torch.eye(4)),
        Reweight(layer, words={"circle": 0.0}, strength=0.5),
    ]
    rows = fork_rows([target] * 3, [[edit] for edit in edits], 1)
    alone = [target.fork(1, interventions=[edit]) for edit in edits]
    assert max(apart(row, one) for row, one in zip(rows, alone, strict=True)) <= 1e-5
    assert min(apart(row, target) for row in rows) > 1e-4


def test_rows_are_computed_in_one_call_a_step_from_the_first_on(model):
    targets = [run(model), run(model, "a blue square", seed=3)]
    with forwards_of(model.pipeline.unet) as calls:
        rows = fork_rows(targets, [[], []], 2)
    assert calls == [4, 4]
    assert [row.images[0].size for row in rows] == [target.images[0].size for target in targets]
    assert [as_bytes(row.initial) for row in rows] == [as_bytes(target.initial) for target in targets]
    assert rows[0].ledger == targets[0].ledger


def test_without_pictures_nothing_is_decoded(model):
    target = run(model)
    with forwards_of(model.pipeline.vae.decoder) as decoded:
        (row, _) = fork_rows([target, target], [[], []], 3, pictures=False)
    assert decoded == []
    assert isinstance(row.images, torch.Tensor)
    with forwards_of(model.pipeline.vae.decoder) as decoded:
        fork_rows([target, target], [[], []], 3)
    assert decoded


def test_joined_runs_come_apart_as_they_were(model):
    records = [run(model), run(model, "a blue square", seed=3)]
    back = separate(joined(records))
    for one, other in zip(records, back, strict=True):
        assert as_bytes(one.latents) == as_bytes(other.latents)
        assert as_bytes(one.noise_pred) == as_bytes(other.noise_pred)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_inference_steps": 3}, "steps, branches"),
        ({"guidance_scale": 2.0}, "differ in guidance_scale"),
        ({"guidance_scale": 1.0}, "steps, branches"),
        ({"prompt": ["a blue square", "a cross"]}, "2 samples"),
        ({"seed": None}, "without a seed"),
    ],
)
def test_runs_that_are_not_alike_are_refused(model, changed, said):
    arguments = {"prompt": "a blue square", "seed": 0, "num_inference_steps": 4} | changed
    with pytest.raises(InputError, match=said):
        joined([run(model), model.record(**arguments)])


def test_a_change_that_cannot_be_one_rows_is_refused(model):
    source = run(model)
    patch = Patch(SITE, source=source, samples=0)
    for edit in (patch, replace(patch, samples=(0,)), TakeLatents(source=source, samples=0)):
        with pytest.raises(InputError, match="one row's of several"):
            fork_rows([source, source], [[edit], []], 0)


class OneNoise:
    """A scheduler's step that adds noise drawn from torch's own generator, whatever it is handed."""

    def __init__(self, step):
        self.step = step

    def __call__(self, *args, **kwargs):
        output = self.step(*args, **kwargs)
        noise = torch.randn(output[0].shape)
        return (output[0] + 0.1 * noise, *output[1:])


def test_noise_that_is_drawn_for_all_rows_at_once_is_noticed():
    pipeline = tiny.sd1()
    pipeline.scheduler.step = OneNoise(pipeline.scheduler.step)
    target = DiffusionModel(pipeline).record("a red circle", seed=0, num_inference_steps=4)
    assert not goes_together(target)


@pytest.mark.parametrize(
    ("count", "about", "sizes"),
    [
        (17, 8, [8, 9]),
        (8, 8, [8]),
        (11, 8, [11]),
        (12, 8, [6, 6]),
        (3, 8, [3]),
        (0, 8, []),
        (3, 1, [1, 1, 1]),
        (3, 2, [1, 2]),
    ],
)
def test_stretches_are_even(count, about, sizes):
    found = list(evenly(range(count), about))
    assert [len(each) for each in found] == sizes
    assert [item for each in found for item in each] == list(range(count))
