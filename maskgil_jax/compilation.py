"""JAX's persistent compilation cache: what was compiled once is read from disk afterwards.

A command line turns it on; importing the package leaves JAX's settings alone.
"""

import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def default_cache_dir() -> pathlib.Path:
    """Return `$JAX_COMPILATION_CACHE_DIR`, else `maskgil_jax` in the user's cache directory."""
    if chosen := os.environ.get(_VARIABLE):
        return pathlib.Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(user) / "maskgil_jax"


def use_cache(directory: os.PathLike | str | None = None) -> pathlib.Path | None:
    """Keep what is compiled in this process from now on, and look there first.

    Args:
        directory: is made if it does not exist; `default_cache_dir()` if `None`; an empty text
            switches the cache off.

    Returns:
        the directory in use, or `None`.

    Raises:
        OSError: if nothing can be written there.
    """
    if directory == "":
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        return None
    path = default_cache_dir() if directory is None else pathlib.Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise OSError(
            f"the compilation cache {path} cannot be used ({error.strerror or error}); choose "
            f"another directory with --compilation_cache or ${_VARIABLE}, or switch it off with "
            '--compilation_cache=""'
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path.absolute()))
    # JAX opens its cache once, at the first compilation, and does not look at the setting again.
    compilation_cache.reset_cache()
    # Small models compile many things in less than JAX's threshold of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path
