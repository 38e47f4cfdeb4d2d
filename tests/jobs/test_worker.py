"""The worker: what goes first, what Stop reaches, and what is left when it is done."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from tests import tiny
from tests.watching import footprint, forwards_of
from workbench.errors import RunStopped
from workbench.jobs.worker import PATIENT, URGENT, Job, Worker
from workbench.models.model import DiffusionModel

LONG = 60


@pytest.fixture
def worker():
    made = Worker("under test")
    yield made
    made.close()


class Gate:
    """Work that says when it has begun, and goes on when it is let."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, job):
        self.begun.set()
        assert self.go.wait(LONG)
        return "through"


def blocked(worker, priority=URGENT):
    """Return a gate and the job that stands before it, running."""
    gate = Gate()
    job = worker.submit(Job("gate", gate, priority=priority))
    assert gate.begun.wait(LONG)
    return gate, job


def until(true):
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_job_runs_in_another_thread_and_gives_its_result(worker):
    job = worker.submit(Job("work", lambda job: (job.label, threading.current_thread().name)))
    assert job.result(LONG) == ("work", "under test")
    assert job.done
    assert job.error() is None


def test_urgent_goes_before_patient_and_each_in_its_order(worker):
    gate, _ = blocked(worker)
    order = []
    jobs = [
        worker.submit(Job(label, lambda job: order.append(job.label), priority=priority))
        for label, priority in [("p1", PATIENT), ("p2", PATIENT), ("u1", URGENT), ("u2", URGENT)]
    ]
    gate.go.set()
    for job in jobs:
        job.result(LONG)
    assert order == ["u1", "u2", "p1", "p2"]


def test_what_a_job_raises_reaches_its_result_and_the_next_runs(worker):
    def fail(job):
        raise ZeroDivisionError("in the work")

    failed = worker.submit(Job("fails", fail))
    with pytest.raises(ZeroDivisionError, match="in the work"):
        failed.result(LONG)
    assert isinstance(failed.error(), ZeroDivisionError)
    assert worker.submit(Job("works", lambda job: 1)).result(LONG) == 1


def test_stop_drops_what_waits(worker):
    gate, running = blocked(worker)
    ran = []
    jobs = [
        worker.submit(Job("waits", lambda job: ran.append(1), priority=each)) for each in (URGENT, PATIENT)
    ]
    assert worker.waiting("waits") == 2
    worker.stop()
    assert worker.waiting("waits") == 0
    assert running.stopping
    assert not running.done
    for job in jobs:
        assert job.done
        with pytest.raises(RunStopped, match="waits was dropped before it began"):
            job.result(LONG)
    gate.go.set()
    assert running.result(LONG) == "through"
    assert worker.submit(Job("next", lambda job: 2)).result(LONG) == 2
    assert ran == []


def test_stop_ends_a_run_before_its_next_denoiser_call_and_leaves_the_model_free(worker):
    pipeline = tiny.sd1()
    model = DiffusionModel(pipeline)
    arguments = {"num_inference_steps": 6, "seed": 0}
    whole = model.record("a red circle", **arguments)
    before = footprint(pipeline)

    def watch(job, tick, latents):
        if tick.step == 2:
            job.stop()

    with forwards_of(pipeline.unet) as calls:
        job = worker.submit(
            Job("run", lambda job: model.record("a red circle", listener=job, **arguments), watch)
        )
        with pytest.raises(RunStopped, match="Stopped in step 3 of the run") as stopped:
            job.result(LONG)
    assert len(calls) == 3
    partial = stopped.value.record
    assert partial.output is None
    assert [row.step for row in partial.ledger][:3] == [0, 1, 2]
    assert partial.latents.equal(whole.latents[:3])
    assert footprint(pipeline) == before
    assert model.record("a red circle", **arguments).latents.equal(whole.latents)


def test_watcher_sees_each_tick_and_the_latents_after_it(worker):
    model, seen = DiffusionModel(tiny.sd1()), []

    def watch(job, tick, latents):
        seen.append((job.label, tick.step, latents.clone()))

    def work(job):
        return model.record("a red circle", num_inference_steps=3, seed=0, listener=job)

    record = worker.submit(Job("run", work, watch)).result(LONG)
    assert [each[:2] for each in seen] == [("run", 0), ("run", 1), ("run", 2)]
    assert all(latents.equal(record.latents[step]) for _, step, latents in seen)


def test_busy_while_an_urgent_job_runs_or_waits(worker):
    assert not worker.busy
    gate, _ = blocked(worker, PATIENT)
    assert not worker.busy
    urgent = worker.submit(Job("urgent", lambda job: None))
    assert worker.busy
    gate.go.set()
    urgent.result(LONG)
    assert not worker.busy
    gate, job = blocked(worker)
    assert worker.busy
    gate.go.set()
    job.result(LONG)
    assert not worker.busy


def test_whoever_asked_is_told_before_the_result_is_out(worker):
    told = []

    def slowly(job):
        time.sleep(0.05)
        told.append((job.label, job.error(), job.done))

    job = Job("work", lambda job: 1)
    job.when_done(slowly)
    assert worker.submit(job).result(LONG) == 1
    assert told == [("work", None, False)]


def test_dropped_job_tells_once(worker):
    gate, _ = blocked(worker)
    told = []
    job = Job("waits", lambda job: 1)
    job.when_done(lambda job: told.append((job.stopping, job.error())))
    worker.submit(job)
    worker.stop()
    job.stop()
    gate.go.set()
    assert told == [(True, None)]


def test_close_ends_the_thread_and_what_it_was_doing(worker):
    gate, job = blocked(worker)
    waiting = worker.submit(Job("waits", lambda job: 1, priority=PATIENT))
    thread = next(each for each in threading.enumerate() if each.name == "under test")
    worker.close()
    assert job.stopping
    gate.go.set()
    thread.join(LONG)
    assert not thread.is_alive()
    with pytest.raises(RunStopped):
        waiting.result(LONG)
    with pytest.raises(RunStopped):
        worker.submit(Job("late", lambda job: 1)).result(LONG)


def test_job_submitted_by_the_last_one_while_closing_does_not_hang(worker):
    late = []

    def work(job):
        worker.close()
        late.append(worker.submit(Job("late", lambda job: 1, priority=PATIENT)))

    worker.submit(Job("closes", work)).result(LONG)
    with pytest.raises(RunStopped):
        late[0].result(LONG)


def test_worker_never_used_has_no_thread():
    idle = Worker("idle under test")
    idle.close()
    assert "idle under test" not in [each.name for each in threading.enumerate()]


class Thing:
    """Something a job holds."""


@pytest.mark.parametrize("fails", [False, True])
def test_finished_job_and_what_it_held_are_let_go(worker, fails):
    def submit():
        thing = Thing()

        def work(job):
            if fails:
                raise ValueError("no")
            return thing

        return worker.submit(Job("work", work, watch=lambda *_: thing)), weakref.ref(thing)

    job, thing = submit()
    until(lambda: job.done)
    gc.collect()
    assert thing() is not None, "the control: while somebody holds the job, all of it is there"
    held, job = weakref.ref(job), None
    until(lambda: gc.collect() is not None and held() is None and thing() is None)
