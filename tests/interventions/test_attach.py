import pytest
import torch
from torch import nn

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError, ShapeError
from workbench.interventions.attach import Attach
from workbench.models.model import DiffusionModel

RUN = {**tiny.WORDED, "num_inference_steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def plain(model):
    return model.record(**RUN, capture=["unet.mid_block"])


def test_a_probe_sees_what_passes_and_changes_no_byte(model, plain):
    seen = []
    watched = model.record(**RUN, interventions=[Attach("unet.mid_block", branch="cond", module=seen.append)])
    assert as_bytes(watched.latents) == as_bytes(plain.latents)
    expected = [plain.at("unet.mid_block", step=step, branch="cond") for step in range(3)]
    assert as_bytes(seen) == as_bytes(expected)


def test_a_module_goes_between_at_its_steps(model, plain):
    channels = plain["unet.mid_block"].shape[2]
    middle = nn.Conv2d(channels, channels, 1).requires_grad_(False)
    changed = model.record(
        **RUN, capture=["unet.mid_block"], interventions=[Attach("unet.mid_block", 1, module=middle)]
    )
    assert as_bytes(changed.latents[0]) == as_bytes(plain.latents[0])
    assert as_bytes(changed.at("unet.mid_block", step=1)) == as_bytes(
        torch.cat([middle(part) for part in plain.at("unet.mid_block", step=1).split(1)])
    )
    assert as_bytes(changed.latents[1]) != as_bytes(plain.latents[1])


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ShapeError, match=r"unet\.mid_block is \(1, .*replacement is \(1, "):
        model.record(**RUN, interventions=[Attach("unet.mid_block", module=lambda value: value[:, :1])])
    with pytest.raises(InputError, match="cannot be called"):
        Attach("unet.mid_block", module=torch.ones(1))


def test_a_change_at_what_is_never_called_is_refused_and_the_run_is_kept():
    model = DiffusionModel(tiny.sd1())
    with pytest.raises(OutOfOrderError, match=r"vae\.encoder was not called") as caught:
        model.record(**tiny.WORDED, seed=0, interventions=[Attach("vae.encoder", module=lambda value: None)])
    assert len(caught.value.record.images) == 1
