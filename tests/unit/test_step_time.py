"""The predicted time of a step: its parts by hand, and published figures that the model was not fitted on."""

import csv
from dataclasses import replace

import pytest
from tests.launching import REPOSITORY

from isotune.config import Recipe
from isotune.preflight.request import DDP, FSDP, PLAIN, Launch
from isotune.preflight.resources.compute import count_flops
from isotune.preflight.resources.devices import find_device
from isotune.preflight.resources.sharding import ModelStats, Parameter, Sharding
from isotune.preflight.resources.step_time import Elsewhere, StepLoad, load_parameters, predict_step
from isotune.preflight.resources.traffic import Traffic

A100 = find_device("A100-80")
# one block of 1,000,000 weights, without a head
WEIGHTS = 1_000_000
MODEL = ModelStats(
    (Parameter(WEIGHTS, 1000, 4 * WEIGHTS, True, True, True),), WEIGHTS, 4 * WEIGHTS, WEIGHTS, WEIGHTS, 4 * WEIGHTS,
    layers=1, attention_size=1000, linear_numel=WEIGHTS, head_numel=0, adapter_numel=0, largest_block_bytes=4 * WEIGHTS,
)  # fmt: skip
SIMPLE = {"products_A100": 0.5, "attention_A100": 0.25, "elementwise_eager": 1.0, "elementwise_fused": 0.5,
          "slowest": 1.1, "overlap": 0.75, "memory": 0.5, "links": 0.5, "launch": 1e-5, "collective": 0.0,
          "hop_nvlink": 1e-5, "hop_pcie": 0.0, "hop_network": 1e-4}  # fmt: skip


def sharding(launch: Launch, **values) -> Sharding:
    recipe = Recipe.from_values(
        model_name_or_path="x", dataset_name="x", output_dir="x", **{"tune": "full", "bf16": True} | values
    )
    return Sharding(recipe, MODEL, launch)


def load(**values) -> StepLoad:
    of_traffic = {"product_bytes": 0.0, "elementwise_bytes": 0.0, "launches": 0.0}
    traffic = Traffic(**{name: values.pop(name, zero) for name, zero in of_traffic.items()})
    return StepLoad(values.pop("product_flops", 0.0), values.pop("attention_flops", 0.0), traffic,
                    values.pop("optimizer_bytes", 0.0))  # fmt: skip


def test_a_process_alone_takes_the_sum_of_its_parts():
    given = load(product_flops=156e12, product_bytes=1.02e12, attention_flops=39e12, elementwise_bytes=0.51e12,
                 optimizer_bytes=1.02e12)  # fmt: skip
    found = predict_step(sharding(Launch(PLAIN, 1)), 1, given, A100, 8, parameters=SIMPLE)
    # 312e12 x 0.5 a second, 2.04e12 x 0.5 bytes a second
    assert found.products == pytest.approx(1.0 + 1.0)
    assert found.attention == pytest.approx(39e12 / (312e12 * 0.25))
    assert found.elementwise == pytest.approx(0.5)
    assert found.optimizer == pytest.approx(1.0)
    assert found.launches == found.communication == 0.0
    assert found.expected == pytest.approx(2.0 + 0.5 + 0.5 + 1.0)
    assert found.mfu == pytest.approx((156e12 + 39e12) / 312e12 / 4.0)
    fused = predict_step(sharding(Launch(PLAIN, 1)), 1, given, A100, 8, parameters=SIMPLE,
                         as_elsewhere=Elsewhere(fused=True, overlaps=True))  # fmt: skip
    assert fused.elementwise == pytest.approx(0.25)


def test_a_small_microbatch_waits_for_the_host():
    given = load(product_flops=156e9, launches=1000)  # 1 ms of the device, 10 ms of the host
    found = predict_step(sharding(Launch(PLAIN, 1)), 1, given, A100, 8, parameters=SIMPLE)
    assert found.launches == pytest.approx(0.009) and found.compute == pytest.approx(0.010)


def test_communication_is_the_rings_and_what_computation_does_not_hide():
    # FSDP2 with one microbatch: two gathers of 2 bytes, one reduction of 4; 2 groups; 15 / 16 of them travel
    sent = 15 / 16 * (2 * 2 + 4) * WEIGHTS
    hops = 2 * 3 * (1 * 1e-4 + 14 * 1e-5)  # two nodes of eight: one hop of the network, 14 within nodes
    travel = sent / (0.5 * min(300e9, 8 * 25e9))
    busy = load(product_flops=156e12)
    found = predict_step(sharding(Launch(FSDP, 16)), 1, busy, A100, 8, parameters=SIMPLE)
    assert found.products == pytest.approx(1.1)  # the slowest of 16
    assert found.communication == pytest.approx(hops + 0.25 * travel)
    idle = predict_step(sharding(Launch(FSDP, 16)), 1, load(), A100, 8, parameters=SIMPLE)
    assert idle.communication == pytest.approx(hops + travel)
    slower = replace(A100, network_bytes_per_second=25e8)
    assert predict_step(sharding(Launch(FSDP, 16)), 1, load(), slower, 8, parameters=SIMPLE).communication == (
        pytest.approx(hops + 10 * sent / (0.5 * 8 * 25e9))
    )
    # DDP reduces once the last backward is over
    ddp = predict_step(sharding(Launch(DDP, 8)), 1, busy, A100, 8, parameters=SIMPLE)
    assert ddp.communication == pytest.approx(2 * 7e-5 + 2 * 7 / 8 * 4 * WEIGHTS / (0.5 * 300e9))


def test_attention_counts_the_width_of_its_heads_and_not_that_of_the_model():
    wide = replace(MODEL, attention_size=2000)
    recipe = sharding(Launch(PLAIN, 1)).recipe
    linear, attention = count_flops(recipe, wide, 100, 100, 100**2)
    assert linear == 6 * WEIGHTS * 100
    assert attention == 3 * (4 * 100**2 / 2) * 2000  # two products of n^2 d, half of them causal; twice that backward


def test_every_parameter_says_where_it_comes_from_and_is_a_share_or_seconds():
    found = load_parameters()
    assert set(SIMPLE) <= set(found)
    shares = [name for name in found if name.startswith(("products", "attention", "memory", "links", "overlap"))]
    assert len(shares) == 9 and all(0 <= found[name] <= 1 for name in shares)
    assert 1 <= found["slowest"] <= 1.3


@pytest.fixture(scope="module")
def benchmark(shared_data):
    if not (shared_data / "published_throughput.csv").is_file():
        pytest.skip(f"{shared_data} has no published_throughput.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "benchmarks")
        import plan_against_published
    with (shared_data / "published_throughput.csv").open(newline="") as file:
        return plan_against_published, list(csv.DictReader(file))


def judged(benchmark, rows):
    module, every = benchmark
    fit_on, judged_by = module.split(every)
    assert not set(fit_on) & set(judged_by)
    cases, _ = module.read_cases([row for row in rows if module.repository(row) in judged_by])
    return [case for case in cases if case.printed]


def test_published_rates_of_mpt_350m_hold_on_8_to_128_devices(benchmark):
    module, rows = benchmark
    chosen = [r for r in rows if r["model"] == "MPT-350m" and r["device"] == "a100_40gb" and r["seq_len"] == "2048"]
    cases = judged(benchmark, chosen)
    assert sorted(case.sharding.launch.world_size for case in cases) == [8, 16, 32, 64, 128]
    parameters = load_parameters()
    assert max(map(abs, module.errors_of(cases, parameters))) < 0.15
    cases.sort(key=lambda case: case.sharding.launch.world_size)
    predicted, printed = [case.predict(parameters) for case in cases], [case.printed for case in cases]
    assert predicted == sorted(predicted, reverse=True) and printed == sorted(printed, reverse=True)
    for found, expected in zip(predicted, printed, strict=True):
        assert found / predicted[0] == pytest.approx(expected / printed[0], abs=0.05)


@pytest.mark.slow
def test_published_figures_that_nothing_was_fitted_on_are_met(benchmark):
    module, rows = benchmark
    cases, others = module.read_cases(rows)
    _, found = module.report(cases, others, module.split(rows)[0])
    assert found["judged_rows"] >= 60 and found["memory_rows"] >= 6
    assert found["median_error"] <= 0.15 and found["within_30_percent"] >= 0.9
    assert found["memory_median_error"] <= 0.15
    assert all(reason.strip() for _, reason in others)
