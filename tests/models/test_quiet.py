"""Bars and remarks are silent for a while, and as they were afterwards."""

import logging
import warnings

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from tests import tiny
from workbench.models.quiet import quiet_load, quiet_run


def test_progress_bar_is_off_for_a_while(capsys):
    pipeline = tiny.sd1()
    pipeline.set_progress_bar_config(disable=False, desc="mine")
    with quiet_run(pipeline):
        pipeline("a red circle", num_inference_steps=1)
    assert capsys.readouterr().err == ""
    assert pipeline._progress_bar_config == {"disable": False, "desc": "mine"}
    pipeline("a red circle", num_inference_steps=1)
    assert "mine" in capsys.readouterr().err


def test_pipeline_without_a_setting_has_none_afterwards():
    pipeline = tiny.sd1()
    del pipeline._progress_bar_config
    seen = []

    def fail():
        with quiet_run(pipeline):
            seen.append(pipeline._progress_bar_config)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [{"disable": True}]
    assert "_progress_bar_config" not in vars(pipeline)


@pytest.fixture
def loudness():
    """Give back the libraries' settings after a test."""
    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    yield libraries
    for library, enabled in zip(libraries, before, strict=True):
        switch(library, enabled)


def switch(library, on):
    if on:
        with warnings.catch_warnings():
            # The hub's bars stay off whatever is asked: the tests' environment says so.
            warnings.simplefilter("ignore", UserWarning)
            library.enable_progress_bar()
    else:
        library.disable_progress_bar()


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_quiet_and_settings_come_back(loudness, shown):
    level, seen = logging.getLogger("transformers").level, []
    for library in loudness:
        switch(library, shown)

    def fail():
        with quiet_load():
            seen.extend(library.is_progress_bar_enabled() for library in loudness)
            seen.append(logging.getLogger("transformers").level)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [False, False, logging.ERROR]
    assert [library.is_progress_bar_enabled() for library in loudness] == [shown, shown]
    assert logging.getLogger("transformers").level == level
