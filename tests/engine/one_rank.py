"""One process of `test_distributed.py`, started as torchrun would: argument 1, a folder."""

import sys
from pathlib import Path

import torch

from engine.toy import toy_run, toy_trainer
from padst_exp.engine import distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    toy_run(Path(sys.argv[1]), trainer=toy_trainer(precision="float64"), world=world, dropout=0.0)
    world.close()
