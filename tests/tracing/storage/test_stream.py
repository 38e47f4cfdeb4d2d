"""Activations on disk: every row with where it comes from, in little memory, whatever the writer meets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from tests import tiny
from tests.killing import killed_at_each_operation
from tests.watching import as_bytes, footprint
from workbench.errors import BusyError, InputError, ShapeError, StoreError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.capture import Capture
from workbench.tracing.storage.dataset import ActivationDataset
from workbench.tracing.storage.shards import Origin
from workbench.tracing.storage.stream import Stream

SITE = "unet.mid_block"
PROMPTS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, stream, prompt=PROMPTS[0], **arguments):
    return model.record(prompt, **{"num_inference_steps": 3, "seed": 0, "capture": [stream], **arguments})


def test_every_row_is_what_a_record_captures(model, tmp_path):
    stream = Stream(tmp_path / "data", [SITE, "unet.conv_in:input"])
    records = [run(model, stream, prompt, capture=[stream, SITE, "unet.conv_in:input"]) for prompt in PROMPTS]
    for site in (SITE, "unet.conv_in:input"):
        dataset = ActivationDataset(tmp_path / "data", site)
        assert len(dataset) == 3 * 3 * 2
        for index, origin in enumerate(dataset.origins()):
            known = records[origin.run].at(site, step=origin.step, branch=origin.branch)[origin.row]
            assert as_bytes(dataset[index]) == as_bytes(known)
            assert origin == dataset.origin(index)
            row = records[origin.run].ledger[origin.call]
            assert (origin.step, origin.timestep) == (row.step, row.timestep)
            assert (origin.prompt, origin.seed, origin.site) == (PROMPTS[origin.run], 0, site)
        whole = torch.cat([rows for rows, _ in dataset.shards()])
        assert as_bytes(whole) == as_bytes(torch.stack([dataset[index] for index in range(len(dataset))]))


def test_samples_have_their_own_prompt_and_seed(model, tmp_path):
    stream = Stream(tmp_path / "data", [SITE])
    run(model, stream, PROMPTS[:2], num_images_per_prompt=2, seed=5, num_inference_steps=1)
    run(model, stream, PROMPTS[:2], seed=[7, 8], num_inference_steps=1)
    run(model, stream, seed=None, num_inference_steps=1)
    found = [
        (each.branch, each.row, each.prompt, each.seed)
        for each in ActivationDataset(tmp_path / "data").origins()
    ]
    one = [(0, PROMPTS[0], 5), (1, PROMPTS[0], 6), (2, PROMPTS[1], 5), (3, PROMPTS[1], 6)]
    two = [(0, PROMPTS[0], 7), (1, PROMPTS[1], 8)]
    three = [(0, PROMPTS[0], None)]
    assert found == [
        (branch, *each) for rows in (one, two, three) for branch in ("uncond", "cond") for each in rows
    ]


def test_looking_changes_nothing(model, tmp_path):
    plain = model.record(PROMPTS[0], num_inference_steps=3, seed=0)
    before = footprint(model.pipeline)
    record = run(model, Stream(tmp_path / "data", [SITE, "unet:output[0]"], shard_bytes=1))
    assert as_bytes(record.latents) == as_bytes(plain.latents)
    assert as_bytes(record.images) == as_bytes(plain.images)
    assert footprint(model.pipeline) == before
    outputs = torch.stack(
        [output.sample if hasattr(output, "sample") else output[0] for output in record.calls]
    )
    rows = torch.cat([each for each, _ in ActivationDataset(tmp_path / "data", "unet:output[0]").shards()])
    assert as_bytes(rows) == as_bytes(outputs.flatten(0, 1))


def test_choices_of_dtype_steps_and_branch(model, tmp_path):
    sites = [SITE, Capture("unet.conv_in", steps=[0, 2], branch="cond")]
    stream = Stream(tmp_path / "more", sites, dtype="float16")
    record = run(model, stream, capture=[stream, SITE, "unet.conv_in"])
    rows, origins = next(ActivationDataset(tmp_path / "more", "unet.conv_in").shards())
    assert torch.equal(rows, record["unet.conv_in"][[0, 2], 1])
    assert [(each.step, each.branch) for each in origins] == [(0, "cond"), (2, "cond")]
    assert torch.equal(ActivationDataset(tmp_path / "more", SITE)[-1], record[SITE][2, 1].half())


def test_other_pipelines_and_what_passes_outside_the_calls(tmp_path):
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())
    stream = Stream(tmp_path / "data", [case.site, "text_encoder:input"])
    record = model.record(**case.arguments, seed=0, capture=[case.site, stream])
    dataset = ActivationDataset(tmp_path / "data", case.site)
    assert as_bytes(torch.cat([rows for rows, _ in dataset.shards()])) == as_bytes(
        record[case.site].flatten(0, 1)
    )
    assert [each.branch for each in dataset.origins()] == ["cond", "uncond"] * 4
    text = list(ActivationDataset(tmp_path / "data", "text_encoder:input").origins())
    assert {(each.call, each.step, each.timestep, each.branch) for each in text} == {
        (None, None, None, "all")
    }


# Shards


def test_shards_are_as_large_as_asked(model, tmp_path):
    row = 16 * 4 * 4 * 4
    with Stream(tmp_path / "data", [SITE], shard_bytes=8 * row) as stream:
        for prompt in PROMPTS:
            run(model, stream, prompt)
    sizes = [len(rows) for rows, _ in ActivationDataset(tmp_path / "data").shards()]
    assert sizes == [8, 8, 2]
    for prompt in PROMPTS:
        run(model, Stream(tmp_path / "apart", [SITE], shard_bytes=8 * row), prompt)
    assert [len(rows) for rows, _ in ActivationDataset(tmp_path / "apart").shards()] == [6, 6, 6]
    first, second = (ActivationDataset(tmp_path / name) for name in ("data", "apart"))
    assert list(first.origins()) == list(second.origins())


def test_a_folder_of_an_earlier_day_is_gone_on_with(model, tmp_path):
    for seed in range(3):
        run(model, Stream(tmp_path / "data", [SITE]), seed=seed)
    origins = list(ActivationDataset(tmp_path / "data").origins())
    assert [(each.run, each.seed) for each in origins[::6]] == [(0, 0), (1, 1), (2, 2)]


def test_another_size_begins_a_shard_of_its_own(model, tmp_path):
    with Stream(tmp_path / "data", [SITE]) as stream:
        run(model, stream)
        run(model, stream, height=32, width=32)
    dataset = ActivationDataset(tmp_path / "data")
    assert [tuple(rows.shape) for rows, _ in dataset.shards()] == [(6, 16, 4, 4), (6, 16, 8, 8)]


def test_a_fork_streams_what_it_computes(model, tmp_path):
    whole = model.record(PROMPTS[0], num_inference_steps=4, seed=0, capture=[SITE])
    fork = whole.fork(2, prompt=PROMPTS[1], capture=[SITE, Stream(tmp_path / "data", [SITE])])
    rows, origins = next(ActivationDataset(tmp_path / "data").shards())
    assert [each.step for each in origins] == [2, 2, 3, 3]
    assert as_bytes(rows) == as_bytes(fork[SITE][2:].flatten(0, 1))


def test_a_run_that_ends_early_leaves_what_it_saw(model, tmp_path):
    class Stop:
        def started(self, row):
            if row.step == 2:
                raise KeyboardInterrupt

        def ticked(self, tick, latents):
            pass

    stream = Stream(tmp_path / "data", [SITE])
    with pytest.raises(KeyboardInterrupt):
        run(model, stream, listener=Stop())
    assert len(ActivationDataset(tmp_path / "data")) == 4
    run(model, stream)
    assert [each.run for each in ActivationDataset(tmp_path / "data").origins()] == [0] * 4 + [1] * 6


def test_killed_at_any_file_operation_the_shards_before_are_readable(model, tmp_path):
    folder = tmp_path / "data"
    run(model, Stream(tmp_path / "first", [SITE]))  # what is loaded at the first run is no writing
    found = []
    # A shard a call: what is killed is the writing, at each of its file operations.
    for killed in killed_at_each_operation(
        lambda: run(model, Stream(folder, [SITE], shard_bytes=1)) and None,
        lambda: shutil.rmtree(folder, ignore_errors=True),
    ):
        if (folder / "dataset.json").exists():
            rows = [rows for rows, _ in ActivationDataset(folder).shards()]
            found.append(as_bytes(torch.cat(rows))[3] if rows else b"")
        assert killed or len(rows) == 3
    whole = found[-1]
    assert all(whole.startswith(each) for each in found)
    assert sorted({len(each) * 3 // len(whole) for each in found}) == [0, 1, 2, 3]


def test_after_a_kill_the_folder_is_gone_on_with(model, tmp_path):
    folder = tmp_path / "data"
    killed = killed_at_each_operation(
        lambda: run(model, Stream(folder, [SITE], shard_bytes=1)) and None, lambda: None
    )
    for _ in range(12):
        next(killed)
    run(model, Stream(folder, [SITE], shard_bytes=1))
    assert [each.step for each in list(ActivationDataset(folder).origins())[-6:]] == [0, 0, 1, 1, 2, 2]


# Memory


def peak(work):
    """Return how far the process's memory rose at its highest, in bytes."""

    def highest():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = highest()
    work()
    return highest() - before


def test_memory_stays_flat_while_the_data_grows(model, tmp_path):
    sites = [
        "unet.conv_in",
        *(f"unet.{path}" for path in ("up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "conv_norm_out")),
    ]
    large = {"num_inference_steps": 8, "height": 128, "width": 128}

    def stream(runs):
        with Stream(tmp_path / "data", sites, shard_bytes=2 << 20) as writing:
            for _ in range(runs):
                run(model, writing, **large)

    def keep(runs):
        kept = [model.record(PROMPTS[0], seed=0, capture=sites, **large) for _ in range(runs)]
        assert len(kept) == runs

    stream(1)
    # Freed memory is used again before the process grows, so the control keeps much more than that.
    few, many = peak(lambda: stream(1)), peak(lambda: stream(16))
    control = peak(lambda: keep(16))
    written = sum(path.stat().st_size for path in (tmp_path / "data").glob("*.safetensors")) / 18
    assert written > 8 << 20
    assert many - few < 3 * written
    assert control > 9 * written


# Reading


@pytest.fixture
def folder(model, tmp_path):
    stream = Stream(tmp_path / "data", [SITE], shard_bytes=1)
    for prompt in PROMPTS:
        run(model, stream, prompt)
    return tmp_path / "data"


def test_a_data_loader_takes_it(folder):
    dataset = ActivationDataset(folder, label=lambda origin: origin.step)
    batches = list(
        DataLoader(dataset, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(0))
    )
    assert sum(len(rows) for rows, _ in batches) == 18
    assert sorted(step for _, steps in batches for step in steps.tolist()) == [0] * 6 + [1] * 6 + [2] * 6
    order = {as_bytes(dataset[index][0])[3]: dataset.origin(index).step for index in range(18)}
    for rows, steps in batches:
        assert [order[as_bytes(row)[3]] for row in rows] == steps.tolist()


def test_workers_of_a_data_loader_read_the_same(folder):
    dataset = ActivationDataset(folder)
    alone = torch.cat(list(DataLoader(dataset, batch_size=4)))
    assert as_bytes(torch.cat(list(DataLoader(dataset, batch_size=4, num_workers=1)))) == as_bytes(alone)


def test_only_what_is_asked_for_is_read(folder):
    spoilt = sorted(folder.glob("*.safetensors"))[1:]
    for path in spoilt:
        path.write_bytes(bytes(path.stat().st_size))
    dataset = ActivationDataset(folder)
    assert len(dataset) == 18
    assert dataset[0].shape == (16, 4, 4)
    assert next(dataset.shards())[1][0] == Origin(SITE, 0, PROMPTS[0], 0, 0, 0, 667.0, "uncond", 0)
    with pytest.raises(StoreError, match="damaged"):
        dataset[-1].clone()


def test_rows_are_counted_from_both_ends(folder):
    dataset = ActivationDataset(folder)
    assert as_bytes(dataset[-1]) == as_bytes(dataset[17])
    for index in (18, -19):
        with pytest.raises(IndexError, match="has 18 rows"):
            dataset[index].clone()
    assert "18 rows in 9 shards" in repr(dataset)


def test_a_folder_is_summed_up_by_json(folder):
    index = json.loads((folder / "000001.json").read_text())
    assert index["sites"][SITE]["shape"] == [16, 4, 4]
    assert index["sites"][SITE]["dtype"] == "float32"
    assert index["runs"]["0"]["arguments"]["num_inference_steps"] == 3


# Bad input


def test_another_writer_is_kept_out(model, tmp_path):
    with Stream(tmp_path / "data", [SITE]) as stream:
        run(model, stream)
        with pytest.raises(BusyError, match="folder of its own"):
            run(model, Stream(tmp_path / "data", [SITE]))
    run(model, Stream(tmp_path / "data", [SITE]))
    assert len(ActivationDataset(tmp_path / "data")) == 12


def test_other_sites_or_dtypes_are_not_mixed_in(model, folder):
    with pytest.raises(StoreError, match=r"holds activations of unet\.mid_block in its own dtype"):
        Stream(folder, [SITE], dtype="float16")
    with pytest.raises(StoreError, match="choose another folder"):
        Stream(folder, ["unet.conv_in"])


def test_what_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds no data set"):
        Stream(tmp_path, [SITE])
    with pytest.raises(StoreError, match="holds no data set"):
        ActivationDataset(tmp_path)
    with pytest.raises(StoreError, match="not there"):
        ActivationDataset(tmp_path / "nowhere")


def test_a_cut_shard_is_named_and_can_be_left_out(folder):
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"remove 000008\.json"):
        ActivationDataset(folder)
    (folder / "000008.json").unlink()
    assert len(ActivationDataset(folder)) == 16
    (folder / "000007.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        ActivationDataset(folder)


def test_bad_choices_are_refused_at_once(model, tmp_path, folder):
    for sites in (SITE, [], Capture(SITE)):
        with pytest.raises(InputError, match="takes a list"):
            Stream(tmp_path / "x", sites)
    with pytest.raises(InputError, match="given twice"):
        Stream(tmp_path / "x", [SITE, Capture(SITE)])
    with pytest.raises(InputError, match="shard_bytes"):
        Stream(tmp_path / "x", [SITE], shard_bytes=0)
    with pytest.raises(UnknownNameError, match=r"'unet\.mid_block'"):
        ActivationDataset(folder, "unet.midblock")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ShapeError, match="say which one"):
        run(model, Stream(tmp_path / "x", ["unet.down_blocks.0"]))
    several = Stream(tmp_path / "y", [SITE, "unet.conv_in"])
    assert len(several.sites) == 2
    with pytest.raises(InputError, match="several sites"):
        ActivationDataset(tmp_path / "y")
