"""Training: the loop, checkpoints, run directories, metrics, processes.

Start reading at `loop.run`.
"""
