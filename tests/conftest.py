"""Tensor shapes in `monitor` are checked while the tests run, and torch keeps to one core, also in
the processes that tests start.
"""

import functools
import os
import random

import jaxtyping
import torch
from beartype import beartype


def checked(signature):
    """beartype's check of a call. It draws from Python's random stream, which the tests watch."""
    check = beartype(signature)

    @functools.wraps(check)
    def leaving_the_random_stream(*args, **kwargs):
        state = random.getstate()
        try:
            return check(*args, **kwargs)
        finally:
            random.setstate(state)

    return leaving_the_random_stream


# Before anything imports monitor. The modules that take what users pass are left out: what they say
# about arguments of wrong types is itself under test.
SHAPED = (
    "ablating",
    "adapters.flex",
    "answers",
    "attention",
    "capture",
    "concepts.building",
    "concepts.vocabulary",
    "detection.chain",
    "detection.events",
    "detection.forming",
    "dictionary",
    "estimate",
    "evidence",
    "features",
    "intervening",
    "labels",
    "losses",
    "memory",
    "noise_scale",
    "parts",
    "probes",
    "sketching",
    "stimuli",
    "streams",
    "transitions.curves",
    "transitions.declaring",
    "transitions.evidence",
    "transitions.noises",
    "transitions.rises",
    "walks",
    "watch",
)
jaxtyping.install_import_hook([f"monitor.{name}" for name in SHAPED], "tests.conftest.checked")

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
