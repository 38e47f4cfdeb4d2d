"""Diffusion Workbench: see inside diffusion models, and change what happens there.

The public names are loaded when they are first used, so that ``import workbench`` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.attention.methods import daam as daam
    from workbench.attention.request import Attention as Attention
    from workbench.experiments.attribution import attribute as attribute
    from workbench.experiments.editing import prompt_to_prompt as prompt_to_prompt
    from workbench.experiments.experiment import Experiment as Experiment
    from workbench.experiments.inversion import invert as invert
    from workbench.experiments.measure import metric as metric
    from workbench.experiments.measured import RunMetric as RunMetric
    from workbench.experiments.sweep import Sweep as Sweep
    from workbench.experiments.text_lens import lens as lens
    from workbench.experiments.text_lens import padding_lens as padding_lens
    from workbench.interventions.attach import Attach as Attach
    from workbench.interventions.attention import ForceMap as ForceMap
    from workbench.interventions.attention import InjectAttention as InjectAttention
    from workbench.interventions.attention import Reweight as Reweight
    from workbench.interventions.corrupt import Corrupt as Corrupt
    from workbench.interventions.feature import Feature as Feature
    from workbench.interventions.patch import Patch as Patch
    from workbench.interventions.replace import Replace as Replace
    from workbench.interventions.scale import Ablate as Ablate
    from workbench.interventions.scale import Scale as Scale
    from workbench.interventions.steer import Steer as Steer
    from workbench.models.diffuser import Diffuser as Diffuser
    from workbench.models.loop import trace_loop as trace_loop
    from workbench.models.model import DiffusionModel as DiffusionModel
    from workbench.models.parallel.nemo import NeMoAutoDiffusionPipeline as NeMoAutoDiffusionPipeline
    from workbench.models.spec import PipelineSpec as PipelineSpec
    from workbench.tracing.capture import Capture as Capture
    from workbench.tracing.record import Record as Record
    from workbench.tracing.storage.dataset import ActivationDataset as ActivationDataset
    from workbench.tracing.storage.saved import load_record as load_record
    from workbench.tracing.storage.stream import Stream as Stream
    from workbench.widgets.app import Workbench as Workbench
    from workbench.widgets.views import component_tree as component_tree
    from workbench.widgets.views import save_html as save_html
    from workbench.widgets.views import step_scrubber as step_scrubber

__version__ = "0.1.0"

_HOMES = {
    "Feature": "workbench.interventions.feature",
    "attribute": "workbench.experiments.attribution",
    "Ablate": "workbench.interventions.scale",
    "ActivationDataset": "workbench.tracing.storage.dataset",
    "Attach": "workbench.interventions.attach",
    "Attention": "workbench.attention.request",
    "Capture": "workbench.tracing.capture",
    "Corrupt": "workbench.interventions.corrupt",
    "Experiment": "workbench.experiments.experiment",
    "Diffuser": "workbench.models.diffuser",
    "DiffusionModel": "workbench.models.model",
    "ForceMap": "workbench.interventions.attention",
    "InjectAttention": "workbench.interventions.attention",
    "NeMoAutoDiffusionPipeline": "workbench.models.parallel.nemo",
    "Patch": "workbench.interventions.patch",
    "PipelineSpec": "workbench.models.spec",
    "Record": "workbench.tracing.record",
    "Replace": "workbench.interventions.replace",
    "Reweight": "workbench.interventions.attention",
    "RunMetric": "workbench.experiments.measured",
    "Scale": "workbench.interventions.scale",
    "Steer": "workbench.interventions.steer",
    "Stream": "workbench.tracing.storage.stream",
    "Sweep": "workbench.experiments.sweep",
    "Workbench": "workbench.widgets.app",
    "errors": "workbench.errors",
    "invert": "workbench.experiments.inversion",
    "lens": "workbench.experiments.text_lens",
    "load_record": "workbench.tracing.storage.saved",
    "metric": "workbench.experiments.measure",
    "padding_lens": "workbench.experiments.text_lens",
    "daam": "workbench.attention.methods",
    "component_tree": "workbench.widgets.views",
    "prompt_to_prompt": "workbench.experiments.editing",
    "save_html": "workbench.widgets.views",
    "step_scrubber": "workbench.widgets.views",
    "trace_loop": "workbench.models.loop",
    "zoo": "workbench.zoo",
}

__all__ = [
    "Ablate",
    "ActivationDataset",
    "Attach",
    "Attention",
    "Capture",
    "Corrupt",
    "Diffuser",
    "DiffusionModel",
    "Experiment",
    "Feature",
    "ForceMap",
    "InjectAttention",
    "NeMoAutoDiffusionPipeline",
    "Patch",
    "PipelineSpec",
    "Record",
    "Replace",
    "Reweight",
    "RunMetric",
    "Scale",
    "Steer",
    "Stream",
    "Sweep",
    "Workbench",
    "__version__",
    "attribute",
    "component_tree",
    "daam",
    "errors",
    "invert",
    "lens",
    "load_record",
    "metric",
    "padding_lens",
    "prompt_to_prompt",
    "save_html",
    "step_scrubber",
    "trace_loop",
    "zoo",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        from workbench.errors import UnknownNameError, nearest

        raise UnknownNameError(f"workbench has no {name!r}.{nearest(name, _HOMES)}")
    module = import_module(home)
    return module if home.rpartition(".")[2] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _attach_to_notebook() -> None:
    """Let a notebook show models and records as widgets, without loading either now."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "display_formatter"):
        return

    def show(value: Any, **options: Any) -> Any:
        return import_module("workbench.widgets.views").show(value, **options)

    formatter = shell.display_formatter.mimebundle_formatter
    formatter.for_type_by_name("workbench.models.model", "DiffusionModel", show)
    formatter.for_type_by_name("workbench.tracing.record", "Record", show)


_attach_to_notebook()
