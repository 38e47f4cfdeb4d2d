import json
import re

import pytest

from tests.widgets import scene
from workbench.errors import InputError
from workbench.widgets.code import CodeView
from workbench.widgets.controls import RunControls
from workbench.widgets.page import save_html


def saved(path):
    text = path.read_text("utf-8")
    return text, json.loads(re.search(r'id="wb-saved">(.*?)</script>', text, re.DOTALL)[1])


def test_page_holds_each_bundle_once_and_all_state(tmp_path):
    text, data = saved(save_html(scene.app(), tmp_path / "run.html", title="run"))
    assert sorted(data["bundles"]) == ["code", "controls", "images", "patch_map", "scrubber", "tree"]
    assert [len(row) for row in data["rows"]] == [1, 3, 2]
    assert data["rows"][2][1]["state"]["code"] == scene.CODE
    assert "<title>run</title>" in text


def test_hostile_text_stays_text(tmp_path):
    widgets = [RunControls(source=scene.HOSTILE), CodeView(code=scene.HOSTILE)]
    text, data = saved(save_html(widgets, tmp_path / "run.html", title=scene.HOSTILE))
    assert "<img src=x" not in text
    assert "\u2028" not in text.partition("</h1>")[2]
    assert text.count("</script>") == 2
    assert data["rows"][0][0]["state"]["source"] == scene.HOSTILE
    assert data["rows"][1][0]["state"]["code"] == scene.HOSTILE


def test_binary_state_travels_apart(tmp_path):
    _, data = saved(save_html(scene.scrubber(), tmp_path / "run.html"))
    paths = [path for path, _ in data["rows"][0][0]["buffers"]]
    assert ["lanes", 0, "frames", "latents", 3] in paths
    assert ["attention", "data"] in paths


def test_page_fetches_nothing(tmp_path):
    text, _ = saved(save_html(scene.app(), tmp_path / "run.html"))
    assert "default-src 'none'" in text
    assert not re.search(r'(src|href)="', text)


@pytest.mark.parametrize("given", [[], [[]], "controls", [scene], None])
def test_what_is_no_widget_is_refused(given, tmp_path):
    with pytest.raises(InputError):
        save_html(given, tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()
