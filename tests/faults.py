"""Errors that fall in the midst of a traced run: at a line of the tracer, or in a forward of the model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import workbench

PACKAGE = str(Path(workbench.__file__).parent)
WATCHED = tuple(f"{PACKAGE}/{name}/" for name in ("tracing", "models", "attention", "interventions"))

ERRORS = (RuntimeError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)

LOOKING_UP = {"resolve", "parse", "modules", "at", "_module_at", "check", "_wanted", "site", "_system"}
REGISTERING = {"before", "after", "wrap", "attach", "watch_exits", "hook_port", "_hook", "_install"}
REGISTERING |= {"hook", "_keep_hookable", "_allow_skip", "open_entrances", "_watch_layer"}
REGISTERING |= {"__enter__", "_begin", "_occupy", "begin"}
EDITING = {"_apply", "apply", "new_value", "put", "pick", "pass_by", "_pass", "replace", "check_fit", "keep"}
LEAVING = {"sweep", "drop", "_remove", "__exit__", "_take_off", "_end", "_leave", "_finish"}
LEAVING |= {"deliver", "restore", "end", "let_go", "forget"}

STAGES = ("look-up", "register", "forward", "edit", "exit", "between")


@dataclass(frozen=True)
class Fault:
    """An error of one kind at one point of a run: the ``point``-th time that its stage is passed."""

    stage: str
    point: int
    error: type[BaseException]


class Injector:
    """Counts the points of a run, and raises at the one that a fault names.

    A point is a line of the tracer's code, or one of the hooks that `inhabit` puts on the model.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.fallen: BaseException | None = None
        self._fault: Fault | None = None
        self._armed = False

    def inhabit(self, pipeline: Any) -> None:
        """Put somebody else's hooks on two modules of three: they stay, and are points of a forward."""
        parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for index, module in enumerate(module for part in parts for module in part.modules()):
            if index % 3 == 0:
                module.register_forward_pre_hook(lambda *_: self._pass("forward"))
            elif index % 3 == 1:
                module.register_forward_hook(lambda *_: self._pass("forward"), always_call=True)

    @contextmanager
    def armed(self, fault: Fault | None = None) -> Iterator[None]:
        """Count the points of what runs inside, and let ``fault`` fall."""
        self.counts.clear()
        self._fault, self.fallen, self._armed = fault, None, True
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)
            self._armed = False

    def _pass(self, stage: str) -> None:
        if not self._armed:
            return
        point = self.counts[stage]
        self.counts[stage] += 1
        fault = self._fault
        if fault is not None and self.fallen is None and (fault.stage, fault.point) == (stage, point):
            self.fallen = fault.error("a fault of the test")
            raise self.fallen

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(WATCHED) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._pass(stage_of(frame.f_code))
        return self._line


def stage_of(code: CodeType) -> str:
    """Return the stage of a run that a function of the tracer belongs to, by its name."""
    for stage, names in zip(STAGES, (LOOKING_UP, REGISTERING, (), EDITING, LEAVING), strict=False):
        if code.co_name in names:
            return stage
    return "between"
