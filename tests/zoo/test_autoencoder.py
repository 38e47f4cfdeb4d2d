import torch

from workbench.zoo.autoencoder import build_autoencoder, image_batches, psnr, to_tensor
from workbench.zoo.shapes import RGB, Scene, Thing, render


def test_pixels_become_numbers_from_minus_one_to_one():
    scene = Scene((Thing("red", "square", "large", (32.0, 32.0), 13.0, "middle"),), "dark")
    tensor = to_tensor(render(scene)[None])
    assert tensor.shape == (1, 3, 64, 64)
    expected = torch.tensor(RGB["red"]) / 127.5 - 1
    assert torch.allclose(tensor[0, :, 32, 32], expected)


def test_the_same_seed_draws_the_same_batches():
    first, again, other = (next(image_batches(seed, 4, 8)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_latents_are_a_quarter_as_wide_and_untrained_images_come_back_badly():
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    with torch.no_grad():
        mean = vae.encode(torch.zeros(2, 3, 64, 64)).latent_dist.mean
    assert mean.shape == (2, 4, 16, 16)
    assert psnr(vae, 0, count=4) < 15
