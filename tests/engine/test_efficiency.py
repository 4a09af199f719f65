import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.toy import MICRO_BATCHES, ToyTask, assert_same_run, toy_run, toy_trainer
from padst_exp.engine import efficiency
from padst_exp.engine.efficiency import Efficiency, energy_meter, flops_per_step, peak_of
from padst_exp.engine.profiling import StepProfiler
from padst_exp.errors import UserError

CPU = torch.device("cpu")


class Slow(ToyTask):
    """Whose samples take longer than a step."""

    def __init__(self) -> None:
        super().__init__()
        inner = self.train

        class Late:
            def __len__(self) -> int:
                return len(inner)

            def __getitem__(self, index: int) -> Any:
                time.sleep(2e-3)
                return inner[index]

        self.train: Any = Late()


def test_a_profile_is_written_once_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain, _ = toy_run(tmp_path, name="plain")
    trainer = toy_trainer(profile=2)
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 14), trainer=trainer)
    folder = tmp_path / "toy" / "profile"
    written = (folder / "trace.json").stat().st_mtime_ns
    toy_run(tmp_path, trainer=trainer)
    assert_same_run(plain.path, tmp_path / "toy")
    assert capsys.readouterr().err.count("profiled 2 steps") == 1
    assert (folder / "trace.json").stat().st_mtime_ns == written
    assert sorted(path.name for path in folder.iterdir()) == ["table.txt", "trace.json"]
    names = {
        str(event.get("name"))
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
    }
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#10", "ProfilerStep#11"} and "aten::addmm" in names
    assert (folder / "table.txt").read_text().startswith("2 steps\n")


def test_no_profile_is_too_short_half_or_worth_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, path = toy_trainer(steps=12, profile=2), tmp_path / "toy" / "profile"
    with pytest.raises(UserError, match=r"^trainer\.profile: expected at most 2, .* got 3"):
        toy_run(tmp_path, trainer=toy_trainer(steps=12, profile=3))
    assert not path.parent.exists()
    with pytest.raises(ConnectionError):
        toy_run(tmp_path, task=ToyTask(fail_at=MICRO_BATCHES * 12), trainer=trainer)
    assert not path.exists()  # it ended amid the second of the two
    toy_run(tmp_path, trainer=trainer)
    told = "nothing is profiled, 10 steps and 2 to profile do not fit into 1"
    assert told in capsys.readouterr().err and not path.exists()

    profiler = StepProfiler(1, folder=path, device=CPU, left=11, say=print)
    path.write_text("in the way")
    for _ in range(12):
        profiler.step()
    assert "warning: no profile could be written to" in capsys.readouterr().out
    assert path.read_text() == "in the way"


def test_waiting_for_input_is_told(tmp_path: Path) -> None:
    fast, _, _ = toy_run(tmp_path, name="fast", trainer=toy_trainer(steps=3))
    slow, _, _ = toy_run(tmp_path, name="slow", task=Slow(), trainer=toy_trainer(steps=3))
    assert 0 < fast["timing"]["input_wait_share"] < slow["timing"]["input_wait_share"] <= 1
    timing = fast["timing"]
    assert timing["mfu"] is None and timing["peak_flops"] is None
    assert timing["peak_from"].startswith("unknown for ")
    assert timing["flops_per_step"] > 0 and "joules_per_sample" not in timing


def test_the_peak_is_given_or_known_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, wide = torch.device("cuda"), toy_trainer(precision="bfloat16")
    assert peak_of(CPU, toy_trainer(peak_flops=1e11)) == (1e11, "trainer.peak_flops")
    for name, peak in {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": None,
        "NVIDIA L4": None,
    }.items():
        monkeypatch.setattr(efficiency, "device_name", lambda device, name=name: name)
        assert peak_of(gpu, wide)[0] == peak, name
        assert peak_of(gpu, toy_trainer())[0] is None  # of float32 none is known
        assert peak_of(CPU, wide)[0] is None
        assert name in peak_of(gpu, wide)[1]
    with pytest.raises(UserError, match=r"^trainer\.peak_flops: expected FLOP/s of one device"):
        toy_trainer(peak_flops=0.0)


def test_shares_of_a_peak() -> None:
    known = Efficiency(4, 1000, 1e5, "trainer.peak_flops", 0.5)
    fields = known.timing(samples_per_second=200.0, processes=2)
    # 50 steps a second of 1000 FLOPs, on two devices.
    assert (fields["flops_per_second"], fields["mfu"]) == (5e4, 0.25)
    assert fields["joules_per_sample"] == 0.5
    assert known.timing(None, 1)["mfu"] is None


def test_flops_of_a_step() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else x

    task, trainer = ToyTask(), toy_trainer()
    layer = nn.Linear(24, 4, bias=False)
    assert flops_per_step(layer, task, trainer, CPU) == 3 * trainer.batch_size * 2 * 24 * 4
    assert flops_per_step(Asks(24, 4), task, trainer, CPU) is None


def test_energy_is_read_where_the_device_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy_meter(CPU) is None
    readings = iter([5_000, 5_000, 8_000])
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-abc": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    gpu = torch.device("cuda")
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc")
    )
    meter = energy_meter(gpu)
    assert meter is not None and -meter() + meter() == 3.0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_meter(gpu) is None
