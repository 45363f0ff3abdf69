"""Memory of computations on a CPU: what is freed is kept for the next step.

XLA asks for the memory of intermediate results anew in every step, some hundred megabytes at a
time. The C library gives so large a piece back to the system as soon as it is freed, and the system
has to fill every page of it with zeros before it hands it out again: that took a quarter of the
time of a training step. A command line switches it off; importing the package changes nothing.

Reference: mallopt(3) of the GNU C library.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys

import jax

# Of malloc.h, with what they are set to: how much is given back at the end of the heap (nothing is,
# at -1), how much more than needed is taken at once, how many pieces may lie outside the heap, and
# how many heaps there may be, as only the first can grow at will.
_SETTINGS = {
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 256 * 2**20),
    "M_MMAP_MAX": (-4, 0),
    "M_ARENA_MAX": (-8, 1),
}


def has_accelerator() -> bool:
    """Return whether JAX may find other devices than the CPU; does not initialise them."""
    if platforms := getattr(jax.config, "jax_platforms"):  # noqa: B009 (mypy does not know it)
        return platforms != "cpu"
    plugins = importlib.util.find_spec("jax_plugins")
    folders = list(plugins.submodule_search_locations or ()) if plugins else []
    return bool(
        any(pkgutil.iter_modules(folders))
        or importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("libtpu")
    )


def keep_freed_memory() -> bool:
    """Keep what this process frees, where it computes on a CPU; call it before JAX computes.

    The process then holds as much memory as it ever needed at a time. Nothing is changed where JAX
    may find an accelerator, where the environment already tells the allocator what to do
    (`MALLOC_…`), or where the C library is another one than GNU's.

    Returns:
        whether it is so.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or chosen or has_accelerator():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(name, value) == 1 for name, value in _SETTINGS.values()])
