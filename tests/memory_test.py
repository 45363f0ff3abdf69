"""Memory that a process frees is kept, where it computes on a CPU."""

import importlib.metadata
import os
import subprocess
import sys

import jax
import pytest

from maskgil_jax import memory

# Prints whether memory is kept, and how many pages the system hands out for 20 pieces of 64 MiB,
# each freed before the next is taken.
_TAKE_AND_FREE = """
import resource
from maskgil_jax import memory
{call}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    piece = bytearray(b"1") * (64 * 2**20)
    del piece
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(call, **environment):
    kept, pages = subprocess.run(
        [sys.executable, "-c", _TAKE_AND_FREE.format(call=call)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return kept == "True", int(pages)


@pytest.fixture(scope="module")
def pages_given_back():
    """Pages of a process that keeps nothing."""
    kept, pages = run("kept = False")
    assert not kept
    return pages


def test_memory_is_taken_from_the_system_once(pages_given_back):
    kept, pages = run("kept = memory.keep_freed_memory()")
    assert kept
    # Each page of 4 KiB once, and some for all that is not ours.
    assert pages < 1.5 * 64 * 2**20 / 4096 < pages_given_back / 8


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_ARENA_MAX": "2"}, {"JAX_PLATFORMS": "cuda,cpu"}],
    ids=["settings", "devices"],
)
def test_other_settings_and_other_devices_are_left_alone(environment, pages_given_back):
    kept, pages = run("kept = memory.keep_freed_memory()", **environment)
    assert not kept
    assert pages > pages_given_back / 2


def test_plugins_of_jax_announce_accelerators(monkeypatch):
    chosen = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
        assert not memory.has_accelerator()
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ("a plugin",))
        assert memory.has_accelerator()
    finally:
        jax.config.update("jax_platforms", chosen)
