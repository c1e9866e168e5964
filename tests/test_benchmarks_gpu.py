"""The GPU mode of the benchmark, on a CPU: the same requests, queues, stages and report, with small cases."""

import dataclasses
import json
import math
import pathlib

import pytest

pytest.importorskip("tqdm")

from benchmarks import __main__ as program
from benchmarks import kernels, report, suites
from benchmarks.cases import EVERY_LOWERING, GPU_CASES, Case, from_dict

ROOT = pathlib.Path(__file__).parents[1]


def test_the_cases_fill_a_gpu() -> None:
    assert {case.name for case in GPU_CASES} >= set(EVERY_LOWERING)
    assert len({case.name for case in GPU_CASES}) == len(GPU_CASES)
    for case in GPU_CASES:
        assert case.operand_bytes > 150 << 20  # several times what a cache holds
        assert 2 <= case.inputs[0] <= 8
        assert from_dict(json.loads(json.dumps(case.as_dict()))) == case


def test_the_rule_s_plan_of_each_kernel_is_timed_first() -> None:
    for case in GPU_CASES:
        trials = list(kernels.trials(case))
        assert [trial.kernel for trial in trials if trial.chosen] == ["result", "inputs", "kernel"]
        for kernel in ("result", "inputs", "kernel"):
            own = [trial for trial in trials if trial.kernel == kernel]
            assert own[0].chosen
            assert len({trial.described for trial in own}) == len(own) > 1


def test_the_stored_run_is_what_the_pages_say() -> None:
    run = json.loads((ROOT / "benchmarks/results/gpu.json").read_text())
    assert report.markdown(run) in (ROOT / "benchmarks/results/gpu.md").read_text()
    results = report.Results(run)
    rows = {
        line.split("|")[1].split(",")[0].strip(): line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "| jax31662_" in line or "| unet_k2s2_bf16, 2" in line
    }
    for case in results.cases:
        cells = [cell.strip(" *") for cell in rows[case].split("|")[2:-1]]
        for kind, (own, peer, lax) in zip(("forward", "training"), (cells[:3], cells[3:]), strict=True):
            assert own == report.milliseconds(results.time(case, kind, "auto"))
            assert float(peer) == pytest.approx(report.over_best_peer(results, case, kind), abs=0.005)
            ratio = report.lax_over_ours(results, case, kind)
            assert lax == (report.times(ratio) if ratio else "not timed")


@pytest.mark.slow
def test_a_run_on_a_cpu_measures_and_compares_everything(monkeypatch, tmp_path) -> None:
    pytest.importorskip("tqdm")
    for name, value in {"JAX_PLATFORMS": "cpu", "BENCHMARK_DEVICE": "cpu", "BENCHMARK_QUEUE": "1"}.items():
        monkeypatch.setenv(name, value)

    def small(case: Case) -> Case:
        n, *space, channels = case.inputs
        return dataclasses.replace(case, inputs=(n, *(max(4, size // 16) for size in space), channels))

    chosen = ("jax31662_bf16", "unet_k2s2_f32")
    monkeypatch.setattr(suites, "GPU_CASES", [small(case) for case in GPU_CASES if case.name in chosen])
    args = program.parse(["--platform", "gpu", "--rounds", "2", "--out", str(tmp_path)])
    (file,) = suites.run(args)
    run = json.loads(file.read_text())
    results = report.Results(run)
    assert results.cases == list(chosen)
    for record in run["results"]:
        if record["status"] == "not installed":
            continue
        expected = (
            {"skipped", "unsupported"}
            if record["contestant"] in ("winograd", "dilated", "matmul", "phases", "jax.lax")
            else set()
        )
        assert record["status"] in expected | {"ok"}, record
        if record["status"] == "ok":
            assert record["median"] > 0
            if record["contestant"] != "floor":
                assert math.isfinite(record["compile_seconds"])
                assert (
                    max(record["errors"].values())
                    < report.ROUNDING["bfloat16" if record["case"].endswith("bf16") else "float32"]
                )
    assert "jax31662_bf16" in report.markdown(run)
