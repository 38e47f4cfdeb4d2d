"""What holds for every test: two threads, no network, no telemetry; set before torch is imported."""

import os

import pytest
from hypothesis import settings

os.environ.update(
    {
        # Not torch.set_num_threads: subprocesses and kernels inherit this, and no test waits for torch.
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        # Loading bars only; a pipeline's own bar stays, it is what counts the steps.
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
)

# The same examples each time in `make test`, many fresh ones in `make soak`.
settings.register_profile("test", deadline=None, derandomize=True, database=None)
settings.register_profile("soak", deadline=None, max_examples=2_000, print_blob=True)
settings.load_profile("test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
