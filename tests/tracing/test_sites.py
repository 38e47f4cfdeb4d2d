import pytest

from tests import tiny
from workbench.errors import InputError, UnknownNameError
from workbench.tracing.sites import Site, modules, resolve


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("unet.mid_block", Site("unet.mid_block")),
        ("unet.mid_block:output", Site("unet.mid_block")),
        ("unet.mid_block:input", Site("unet.mid_block", "input")),
        ("unet:output.sample", Site("unet", "output", ("sample",))),
        ("unet:inputs[1].encoder_hidden_states", Site("unet", "inputs", (1, "encoder_hidden_states"))),
        ("blocks.0:output[12]", Site("blocks.0", "output", (12,))),
    ],
)
def test_a_site_is_read_from_its_spelling(text, site):
    assert Site.parse(text) == site
    assert Site.parse(str(site)) == site


def test_a_site_is_spelled_without_the_default_port():
    assert str(Site("unet.mid_block")) == "unet.mid_block"
    assert str(Site("unet", "output", ("sample",))) == "unet:output.sample"


def test_a_parsed_site_stays_itself():
    site = Site("unet", "inputs", (1, "timestep"))
    assert Site.parse(site) is site


@pytest.mark.parametrize(
    "text", ["", "unet mid", "unet:", "unet:output[x]", ":output", "unet:output[0", 3, None]
)
def test_what_is_no_site_is_refused_with_the_spelling(text):
    with pytest.raises(InputError, match=r"'unet.mid_block:input'"):
        Site.parse(text)


def test_an_unknown_port_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"No port 'outputs' .* Did you mean 'output'"):
        Site.parse("unet.mid_block:outputs")


def test_modules_are_listed_by_path_with_components_first():
    pipeline = tiny.sd1()
    found = modules(pipeline.components)
    assert found["unet"] is pipeline.unet
    assert found["unet.down_blocks.1.attentions.0"] is pipeline.unet.down_blocks[1].attentions[0]
    assert "scheduler" not in found


def test_a_path_leads_to_its_module():
    pipeline = tiny.sd1()
    assert resolve(pipeline.components, "unet") is pipeline.unet
    assert resolve(pipeline.components, "unet.mid_block") is pipeline.unet.mid_block


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("unet.midblock", "'unet.mid_block'"),
        ("unett", "'unet'"),
        ("mid_block", "'unet.mid_block'"),
        ("scheduler", ""),
        ("unet.config", ""),
    ],
)
def test_an_unknown_path_names_the_nearest(path, near):
    with pytest.raises(UnknownNameError, match=f"no module or method '{path}'.*{near}"):
        resolve(tiny.sd1().components, path)
