"""What needs packages that few have: adapters, and the scheduler of a stochastic differential equation."""

from tests.beside import needs_beside, run_beside

FILES = ("tests/tracing/test_guards.py", "tests/tracing/test_schedulers.py")


@needs_beside
def test_adapters_are_traced_and_the_sde_scheduler_keeps_its_promises():
    printed = run_beside(*FILES, "-k", "LoRA or DPMSolverSDE")
    for name in ("LoRA", "DPMSolverSDE"):
        assert any(name in line and "PASSED" in line for line in printed.splitlines())
