"""Machine files made of measurements: a prediction of what was measured equals it."""

import json

import pytest

from horovod_owt.config import TrainConfig
from horovod_owt.errors import ConfigError
from horovod_owt.perf.calibrate import calibrate
from horovod_owt.perf.layers import net_of
from horovod_owt.perf.machine import load_machine
from horovod_owt.perf.parts import Job
from horovod_owt.perf.plan import predict_row

NET = net_of("alexnet-owt")
BASE = load_machine("one-gk210")


def scaling_json(path, step_ms: dict[int, float], **method):
    """As `owt bench scaling` on one rank writes it, a file for each batch."""
    files = []
    for batch, ms in step_ms.items():
        row = {
            "strategy": "data",
            "precision": "fp32",
            "ranks": 1,
            "batch_per_rank": batch,
            "step_ms": {"min": 0.9 * ms, "p25": 0.95 * ms, "median": ms, "p75": 1.05 * ms},
        }
        method = {"model": "alexnet-owt", "image_size": 224, **method}
        files.append(path / f"b{batch}.json")
        files[-1].write_text(json.dumps({"rows": [row], "method": method}))
    return files


def predicted_ms(machine, batch: int, precision: str = "fp32") -> float:
    cfg = TrainConfig(classes=1000, batch=batch, precision=precision)
    return 1e3 * predict_row(machine, Job(cfg, NET, 1, 1, decodes=False)).step_s


def test_one_batch_gives_a_rate(tmp_path):
    made = calibrate(BASE, scaling_json(tmp_path, {128: 500.0}), NET)
    assert predicted_ms(made, 128) == pytest.approx(500)
    assert made["jitter"] == pytest.approx(0.1 / 1.349)
    assert "b128.json" in made.figures["conv_gflops"].source


def test_two_batches_give_a_fixed_time_as_well(tmp_path):
    step_ms = {32: 200.0, 128: 500.0}
    made = calibrate(BASE, scaling_json(tmp_path, step_ms), NET)
    assert {batch: predicted_ms(made, batch) for batch in step_ms} == pytest.approx(step_ms)
    assert made["fixed_ms"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_16_bits_is_predicted_as_it_was_measured(tmp_path, precision):
    cpu = load_machine("cpu-2-cores")  # four times as slow in 16 bits
    files = scaling_json(tmp_path, {8: 2400.0, 32: 8700.0})
    for file in files:
        file.write_text(file.read_text().replace('"fp32"', f'"{precision}"'))
    for wanted in ([8], [32], [8, 32]):
        made = calibrate(
            cpu, [file for batch, file in zip((8, 32), files, strict=True) if batch in wanted], NET
        )
        for batch in wanted:
            assert predicted_ms(made, batch, precision) == pytest.approx({8: 2400, 32: 8700}[batch])


def test_ceilings_in_16_bits_are_rates_in_16_bits(tmp_path):
    file = tmp_path / "ceilings.json"
    figures = {"conv_gflops": 20, "memory_gb_s": 12}
    file.write_text(json.dumps({"figures": figures, "method": {"precision": "bf16"}}))
    made = calibrate(load_machine("cpu-2-cores"), [file], NET)
    assert (made["conv_gflops"], made["memory_gb_s"]) == (pytest.approx(20 / 0.25), 12)


def test_ceilings_give_their_figures(tmp_path):
    file = tmp_path / "ceilings.json"
    file.write_text(json.dumps({"figures": {"conv_gflops": 44, "core_gb_s": 1.5}, "method": {}}))
    made = calibrate(BASE, [file], NET)
    assert (made["conv_gflops"], made["core_gb_s"]) == (44, 1.5)


def test_a_run_gives_the_rate_of_its_steps_without_their_waits(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"batch": 64, "classes": 1000}))
    step = {"kind": "step", "step_ms": 300.0, "data_wait_ms": 60.0, "exposed_comm_ms": 40.0}
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(step) for _ in range(20)))
    made = calibrate(BASE, [tmp_path], NET)
    assert predicted_ms(made, 64) == pytest.approx(200)


def test_a_made_machine_can_be_loaded(tmp_path):
    made = calibrate(BASE, scaling_json(tmp_path, {128: 500.0}), NET)
    file = tmp_path / "mine.yaml"
    file.write_text(made.to_yaml())
    assert load_machine(str(file)).figures == made.figures


@pytest.mark.parametrize(
    "tag", ["[0]<stdout>:", "Fri Nov 27 01:02:03 2026[0]<stdout>:", "[n1@1,0]<stdout>: "]
)
def test_a_measurement_may_have_the_tags_of_horovodrun(tmp_path, tag):
    file = tmp_path / "ceilings.json"
    text = json.dumps({"figures": {"conv_gflops": 50, "fc_gflops": 40}}, indent=1)
    file.write_text("".join(f"{tag}{line}\n" for line in text.splitlines()))
    assert calibrate(BASE, [file], NET)["conv_gflops"] == 50


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "contains a list"),
        ("{}", "lacks 'method'"),
        ('{"figures": {"conv_gflops": -1}}', "conv_gflops=-1"),
        ('{"figures": {"conv_gflop": 1}}', "unknown key 'conv_gflop'"),
        ('{"figures": 3, "method": 4}', "lacks"),
        ('{"method": {}, "rows": []}', "has no row of one rank"),
        ('{"method": {"model": "alexnet-owt-bn"}, "rows": []}', "measured with model=alexnet-owt-bn"),
        ('{"method": {"image_size": 128}, "rows": []}', "measured with image_size=128"),
    ],
)
def test_what_is_no_measurement_of_this_net_is_refused_in_one_line(tmp_path, text, told):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        calibrate(BASE, [file], NET)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_step_faster_than_the_rest_of_the_machine_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="less than one-gk210 needs for the FC layers"):
        calibrate(BASE, scaling_json(tmp_path, {128: 1.0}), NET)


def test_a_run_without_steps_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"batch": 8}')
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no steps yet"):
        calibrate(BASE, [tmp_path], NET)
