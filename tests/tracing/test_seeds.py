import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.tracing.seeds import generators


def noise(generator):
    return torch.randn(4, generator=generator).tolist()


def test_one_sample_gets_one_generator_on_the_cpu():
    generator = generators(3, prompts=1, images=1)
    assert generator.device.type == "cpu"
    assert noise(generator) == noise(torch.Generator("cpu").manual_seed(3))


def test_prompts_share_their_noise_and_images_do_not():
    made = [noise(each) for each in generators(3, prompts=2, images=2)]
    assert made[0] == made[2] == noise(torch.Generator().manual_seed(3))
    assert made[1] == made[3] == noise(torch.Generator().manual_seed(4))


def test_a_list_gives_each_sample_its_own():
    made = [noise(each) for each in generators([5, 9], prompts=1, images=2)]
    assert made == [noise(torch.Generator().manual_seed(seed)) for seed in (5, 9)]


def test_no_seed_leaves_the_noise_to_the_pipeline():
    assert generators(None, prompts=2, images=1) is None


def test_numpy_integers_are_seeds():
    assert noise(generators(np.int64(3), prompts=1, images=1)) == noise(generators(3, prompts=1, images=1))


@pytest.mark.parametrize("seed", ["7", 1.5, True, [1.5], [None], object(), 2**70, -(2**70)])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(InputError, match="seed="):
        generators(seed, prompts=1, images=1)


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_seeds_must_be_one_a_sample(seeds):
    with pytest.raises(InputError, match=f"{len(seeds)} seeds for 2 samples"):
        generators(seeds, prompts=2, images=1)
