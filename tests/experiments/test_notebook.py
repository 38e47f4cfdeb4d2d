"""The notebook about colour finds the layer that decides it, by few seeds as by many."""

import json
from pathlib import Path

from workbench.zoo.planted import PLANTED

AROUND = tuple(f"up_blocks.2.attentions.{place}.transformer_blocks.0.attn2" for place in (0, 1))
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_where_colour.ipynb"


def test_the_notebook_names_the_layer_and_its_controls_are_low(capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {"LAYERS": ("up_blocks.1.attentions.1.transformer_blocks.0.attn2", *AROUND)}
    for cell in cells:
        if cell["cell_type"] == "code":
            code = (
                "".join(cell["source"]).replace("SEEDS = 4", "SEEDS = 2").replace("10, 20, 2", "10, 20, 10")
            )
            code = code.replace("check=12", "check=4").replace('endswith("attn2")', "endswith(LAYERS)")
            exec(compile(code, cell["id"], "exec"), names)
    assert names["layer"] == f"unet.{PLANTED}"
    found, cell = names["found"], names["cell"]
    assert float(cell.towards_mean) > 0.5
    assert float(cell.reads_red.mean()) == 1
    assert float(abs(found.towards_identity).max()) == 0
    assert float(cell.towards_random.mean()) < 0.2
    assert float(names["runner_up"]) < 0.5
    assert "rank correlation" in capsys.readouterr().out
