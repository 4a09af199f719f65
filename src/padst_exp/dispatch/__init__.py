"""Which kernel computes each sparse layer: measured once on each machine, remembered."""

from padst_exp.dispatch.backends import Choice, choose, forced, restore, reuse, save
from padst_exp.dispatch.decision import Decision, device_name, fastest, measure

__all__ = [
    "Choice",
    "Decision",
    "choose",
    "device_name",
    "fastest",
    "forced",
    "measure",
    "restore",
    "reuse",
    "save",
]
