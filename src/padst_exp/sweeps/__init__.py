"""Sweeps: what runs an experiment consists of, which of them are left, and how they are run."""

from padst_exp.sweeps.jobs import Job, Source, compose, expand, jobs

__all__ = ["Job", "Source", "compose", "expand", "jobs"]
