import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from maskgil_jax import compilation


@pytest.fixture(autouse=True)
def restored():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something(number):
    """Compile a program of its own, however fast that is."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.jit(lambda x: jnp.sin(x) * number)(jnp.ones(3)).block_until_ready()


def test_what_is_compiled_lies_in_the_directory_named_last(tmp_path):
    def count():
        return [sum(1 for _ in (tmp_path / name).glob("*-cache")) for name in "ab"]

    compilation.use_cache(tmp_path / "a")
    compilation.use_cache(tmp_path / "b")
    compile_something(1.25)
    first = count()
    assert first[0] == 0
    assert first[1] > 0
    compilation.use_cache(tmp_path / "a")
    compile_something(2.25)
    second = count()
    assert second[0] > 0
    assert second[1] == first[1]
    compilation.use_cache("")
    compile_something(3.25)
    assert count() == second


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compilation.default_cache_dir() == pathlib.Path.home() / ".cache" / "maskgil_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert compilation.default_cache_dir() == tmp_path / "user" / "maskgil_jax"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert compilation.use_cache() == tmp_path / "jax"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")
    assert compilation.use_cache(tmp_path / "flag") == tmp_path / "flag"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "flag")
    assert (tmp_path / "flag").is_dir()


def test_an_empty_text_switches_the_cache_off(tmp_path):
    compilation.use_cache(tmp_path)
    assert compilation.use_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"/file cannot be used \(File exists\).*_cache=\"\""):
        compilation.use_cache(tmp_path / "file")
