import re

import numpy as np
import pytest
import tiny

import maskgil_jax
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.pictures import to_float
from tools import measure_tiling


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


def test_a_mosaic_is_rows_of_test_images():
    digits = digits_arrays("test")[0]
    mosaic = measure_tiling.make_mosaic("digits", 96)
    assert mosaic.shape == (1, 96, 96, 3)
    np.testing.assert_array_equal(mosaic[0, :32, 64:], digits[2])
    np.testing.assert_array_equal(mosaic[0, 32:64, :32], digits[3])
    assert measure_tiling.make_mosaic("canvases", 128).shape == (1, 128, 128, 3)


@pytest.mark.usefixtures("quick_compilation")
def test_the_table_compares_tiles_with_the_whole(directory, capsys, monkeypatch):
    def count_bytes(tokenizer, method, side):
        return measure_tiling.MEBIBYTE * (side + (method == "decode"))

    monkeypatch.setattr(measure_tiling, "count_bytes", count_bytes)
    arguments = [f"--tokenizer={directory}", "--data=digits", "--size=64", "--tile_sizes=32"]
    assert measure_tiling.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    names, _, whole, tiled = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert names == list(measure_tiling.COLUMNS)
    whole, tiled = dict(zip(names, whole, strict=True)), dict(zip(names, tiled, strict=True))
    assert (whole["tile"], whole["codes"], tiled["tile"]) == ("whole", "1", "32")
    image = to_float(measure_tiling.make_mosaic("digits", 64))
    codes = maskgil_jax.load_tokenizer(directory).encode(image, batch_size=1)
    near = maskgil_jax.load_tokenizer(directory, tile_size=32).encode(image, batch_size=1)
    assert tiled["codes"] == f"{np.mean(near == codes):.3f}"
    assert float(tiled["codes"]) < 1
    assert 0 < float(tiled["decoded"]) < 100
    assert [row[name] for row in (whole, tiled) for name in ("encode", "decode")] == [
        *("64", "65"),
        *("32", "33"),
    ]


def test_a_tile_needs_less_memory(directory):
    tokenizer = maskgil_jax.load_tokenizer(directory)
    small, large = (measure_tiling.count_bytes(tokenizer, "decode", side) for side in (32, 128))
    # Attention: four bytes for every pair of tokens.
    assert large >= 4 * 1024**2 > small > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 48}, "--size 48: a mosaic of digits needs a multiple of 32, at most 544"),
        ({"size": 576}, "--size 576: .*at most 544"),
        ({"tile_sizes": "64,128"}, "--tile_sizes 128: the picture of 64 is no larger"),
        ({"tile_sizes": "10"}, "tile_size is 10"),
        ({"tile_sizes": "32,a"}, "--tile_sizes '32,a': write numbers, such as 64,128"),
    ],
)
def test_bad_requests_are_refused(directory, capsys, changes, message):
    values = {"tokenizer": directory, "data": "digits", "size": 64, "tile_sizes": "32"} | changes
    assert measure_tiling.main([f"--{name}={value}" for name, value in values.items()]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert re.search(message, errors)
