"""What is free is the container's, where that has less than the machine."""

import psutil
import pytest

from workbench.tracing.memory import free_memory


@pytest.fixture
def container(tmp_path):
    def made(most, used, cached=0):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
        return tmp_path

    return made


def test_a_container_has_what_is_left_of_its_limit(container):
    assert free_memory(container(1 << 20, 1 << 19, 100)) == (1 << 19) + 100
    assert free_memory(container(1 << 20, 1 << 21)) == 0


def test_without_a_limit_the_machine_s_is_free(container, tmp_path):
    for place in (container("max", 1 << 40), tmp_path / "nowhere", container(1 << 60, 0)):
        assert free_memory(place) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
