"""Four fake CPU devices, shapes and types checked at run time, rank promotion an error."""

import os

import jaxtyping
import pytest


def pytest_xdist_auto_num_workers(config):
    """Spread the whole suite over the cores; run files that are named in this process.

    A worker takes up to 3 GB: no more than four.
    """
    if config.args_source is not config.ArgsSource.TESTPATHS:
        return 0
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(4, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def pytest_configure(config):
    chosen = config.getoption("markexpr")
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
    # jax reads the environment when it is first used, so it is imported here.
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Before the first import of the package, whose annotations the hook turns into checks.
    jaxtyping.install_import_hook("maskgil_jax", "beartype.beartype")


@pytest.fixture(scope="module")
def _forget_programs():
    """Leave no quickly compiled program to other modules, whose results rounding may decide."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture
def quick_compilation(_forget_programs, tmp_path_factory):
    """Compile in half the time, and equal programs once, to slower programs.

    For what does not depend on rounding.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_disable_most_optimizations": True,
        # A directory of the worker's own: JAX's cache does not write atomically.
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
