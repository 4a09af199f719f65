"""How well a run uses its device: FLOPs of a step, the peak they are held against, energy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from padst_exp.analysis.cost import count
from padst_exp.data.sampler import validation_loader
from padst_exp.data.task import Task
from padst_exp.dispatch import device_name
from padst_exp.engine.evaluation import to_device
from padst_exp.engine.settings import Trainer
from padst_exp.engine.step import eagerly

# FLOP/s of dense bfloat16 products in NVIDIA's data sheets, by the whole name of a device. Hopper's
# PCIe and NVL cards and slices of a GPU have other peaks.
PEAKS = {
    r"NVIDIA A100(?!.*MIG).*": 312e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H200": 989e12,
}
# Products of a step: forward, and backward for inputs and for weights.
PASSES = 3


@dataclass(frozen=True)
class Efficiency:
    """What a step takes, beside what a device could do.

    Args:
        batch_size: samples of a step, over all processes.
        flops_per_step: three times those of the forward passes, as the model is; None: unknown.
        peak_flops: FLOP/s of one device; None: unknown.
        peak_from: who says so, or how to say it.
        joules_per_sample: None where the device does not tell.
    """

    batch_size: int
    flops_per_step: int | None
    peak_flops: float | None
    peak_from: str
    joules_per_sample: float | None

    def timing(self, samples_per_second: float | None, processes: int) -> dict[str, object]:
        """Fields of a summary; MFU is the share of the peak of all devices that was reached."""
        rate = None
        if self.flops_per_step is not None and samples_per_second is not None:
            rate = self.flops_per_step * samples_per_second / self.batch_size
        known = rate is not None and self.peak_flops is not None
        fields: dict[str, object] = {
            "flops_per_step": self.flops_per_step,
            "flops_per_second": rate,
            "peak_flops": self.peak_flops,
            "peak_from": self.peak_from,
            "mfu": rate / (self.peak_flops * processes) if known else None,  # type: ignore[operator]
        }
        if self.joules_per_sample is not None:
            fields["joules_per_sample"] = self.joules_per_sample
        return fields


def flops_per_step(
    model: nn.Module, task: Task, trainer: Trainer, device: torch.device
) -> int | None:
    """FLOPs of the passes of one step over all processes, counted on one sample.

    None for a model that cannot be followed without computing it.
    """
    try:
        batches = validation_loader(task, batch_size=1, rank=0, world_size=1, workers=0)
        inputs, _ = to_device(next(iter(batches)), device, trainer.precision)
        with eagerly(trainer.compile):
            return PASSES * trainer.batch_size * count(model, inputs).flops
    except Exception:  # whatever somebody's model does with shapes; the training itself is done
        return None


def peak_of(device: torch.device, trainer: Trainer) -> tuple[float | None, str]:
    """FLOP/s that one device could reach, and who says so. Nothing is guessed."""
    if trainer.peak_flops is not None:
        return trainer.peak_flops, "trainer.peak_flops"
    name = device_name(device)
    if device.type == "cuda" and trainer.precision == "bfloat16":
        for pattern, peak in PEAKS.items():
            if re.fullmatch(pattern, name):
                return peak, f"data sheet of {name}, dense bfloat16"
    unknown = f"unknown for {name} in {trainer.precision}"
    return None, f"{unknown}: trainer.peak_flops=<FLOP/s of one device>"


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """What reads the joules that a GPU has used since its driver came up.

    None where NVML does not tell: on CPUs, without `pynvml`, on GPUs before Volta.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no driver, or no such counter: there is nothing to read then
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # of millijoules
