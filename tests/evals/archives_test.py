"""Whatever bit of an archive is wrong, it is said to be damaged."""

import re

import numpy as np
import pytest

from maskgil_jax.evals.archives import name_damage
from maskgil_jax.evals.frechet import load_statistics


def flip_each_byte(contents):
    for index in range(len(contents)):
        for bit in (0, 3, 5):
            damaged = bytearray(contents)
            damaged[index] ^= 1 << bit
            yield bytes(damaged)


def test_every_kind_of_damage_is_the_same_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    refused = 0
    reasons = set()
    for contents in flip_each_byte(path.read_bytes()):
        path.write_bytes(contents)
        try:
            statistics, spatial = load_statistics(path)
        except ValueError as error:
            refused += 1
            reasons.add(type(error.__cause__).__name__)
        else:
            assert spatial is None
            np.testing.assert_array_equal(statistics.mean, np.zeros(2))
            np.testing.assert_array_equal(statistics.covariance, np.eye(2))
    assert refused > 1000
    assert reasons >= {"BadZipFile", "NotImplementedError", "RuntimeError", "OSError"}


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), OSError(5, "disk"), KeyError("x")])
def test_what_is_no_damage_passes(error):
    with pytest.raises(type(error), match=re.escape(str(error))), name_damage("x.npz"):
        raise error
