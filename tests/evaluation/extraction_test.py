"""Features are of whole batches of the net, in memory once, and the same however they come."""

import os
import tracemalloc

import jax
import numpy as np
import pytest
from fake_evaluation import FakeImages, FakeNet, make_pixels

from maskgil_jax.evals import frechet
from maskgil_jax.evals.extractor import FeatureExtractor
from maskgil_jax.evals.inception import Inception, InceptionConfig
from maskgil_jax.evaluation import extraction
from maskgil_jax.evaluation.extraction import collect, collect_statistics, extract, stream
from maskgil_jax.evaluation.nets import InceptionNet

NAMES = ("pool", "spatial")


def check(found, count):
    expected = FakeNet().extract(make_pixels(count), NAMES)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("batch_size", "calls"),
    [
        (1, [4, 4, 4, 4, 4, 2]),
        (8, [8, 8, 6]),
        (11, [8, 8, 6]),  # whole chunks, and no more than the batch
        (64, [22]),
    ],
)
def test_a_net_gets_as_many_chunks_as_fill_its_batch(tmp_path, batch_size, calls):
    images, net = FakeImages(22), FakeNet(batch_size=batch_size)
    check(extract(images, net, NAMES, tmp_path, chunk_size=4), 22)
    assert net.calls == calls
    # However large its batch, no more is read or generated at a time.
    assert images.reads == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 22)]
    assert len(os.listdir(tmp_path)) == len(calls)
    net.calls.clear()
    check(collect(images, net, NAMES, chunk_size=4), 22)
    assert net.calls == calls


def test_a_part_of_the_images_is_taken(tmp_path):
    images, net = FakeImages(22), FakeNet(batch_size=8)
    found = list(stream(images, net, ("pool",), range(3, 15), chunk_size=4))
    assert [len(part["pool"]) for part in found] == [8, 4]
    assert images.reads == [(3, 7), (7, 11), (11, 15)]
    expected = net.extract(make_pixels(22), ("pool",))["pool"][3:15]
    np.testing.assert_array_equal(np.concatenate([part["pool"] for part in found]), expected)


def test_only_shards_that_are_missing_or_of_another_shape_are_made(tmp_path):
    net = FakeNet(batch_size=8)
    check(extract(FakeImages(22), net, NAMES, tmp_path, chunk_size=4), 22)
    for name, rows, widths in (("000000000", 7, (4, 5)), ("000000008", 8, (3, 5))):
        arrays = {
            name: np.ones((rows, width), np.float32)
            for name, width in zip(NAMES, widths, strict=True)
        }
        np.savez(tmp_path / f"{name}.npz", **arrays)
    images = FakeImages(22)
    check(extract(images, net, NAMES, tmp_path, chunk_size=4), 22)
    assert images.reads == [(0, 4), (4, 8), (8, 12), (12, 16)]
    images = FakeImages(22)
    check(extract(images, net, NAMES, tmp_path, chunk_size=4), 22)
    assert images.reads == []


def test_statistics_are_those_of_all_features(monkeypatch):
    monkeypatch.setattr(frechet, "BLOCK_ROWS", 10)
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 10)
    found = collect_statistics(FakeImages(23), FakeNet(batch_size=8), NAMES, chunk_size=3)
    for name, features in FakeNet().extract(make_pixels(23), NAMES).items():
        expected = frechet.Statistics.of_features(features)
        assert found[name].count == 23
        np.testing.assert_array_equal(found[name].mean, expected.mean)
        np.testing.assert_array_equal(found[name].covariance, expected.covariance)


class WideNet(FakeNet):
    """Features of 8 KiB an image, as Inception's are."""

    def __init__(self):
        super().__init__(batch_size=64)
        self.widths = {"pool": 2048}

    def extract(self, images, names):
        return {"pool": images.reshape(len(images), -1)[:, :1].repeat(2048, 1).astype(np.float32)}


def test_statistics_need_no_memory_for_features(monkeypatch):
    monkeypatch.setattr(extraction, "BLOCK_ROWS", 64)
    statistics = {}
    # A product of 2048 × 2048 would hide what features take.
    monkeypatch.setattr(
        extraction, "add_statistics", lambda *a: statistics.update({a[1]: len(a[2])})
    )
    images, net = FakeImages(2000), WideNet()
    tracemalloc.start()
    try:
        collect_statistics(images, net, ("pool",), chunk_size=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert statistics == {"pool": 2000 % 64}
    assert peak < 0.2 * 2000 * 2048 * 4


@pytest.mark.parametrize("how", ["collect", "extract", "extract again"])
def test_features_are_held_once(tmp_path, how):
    images, net = FakeImages(2000), WideNet()

    def run():
        if how == "collect":
            return collect(images, net, ("pool",), chunk_size=64)
        return extract(images, net, ("pool",), tmp_path, chunk_size=64)

    if how == "extract again":
        run()
    tracemalloc.start()
    try:
        found = run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = found["pool"].nbytes
    assert size == 2000 * 2048 * 4
    # The whole, and some shards on their way: half a MiB each.
    assert size <= peak < 1.25 * size
    np.testing.assert_array_equal(found["pool"][:, 5], make_pixels(2000)[:, 0, 0, 0])


@pytest.fixture(scope="module")
def inception():
    config = InceptionConfig(channels=2, num_logits=5)
    module, rng = config.make_module(), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32) / 10, shapes)
    return Inception(config=config, params=params, sha256="0", fingerprint="0")


def test_inception_computes_no_padding_but_at_the_end(inception, monkeypatch, quick_compilation):
    """Four devices: batches of 16 images, whatever is read at a time."""
    net, images = InceptionNet(inception), FakeImages(20)
    assert net.batch_size == FeatureExtractor(inception).batch_size == 16
    batches = []
    start = FeatureExtractor._start
    monkeypatch.setattr(
        FeatureExtractor, "_start", lambda self, x: batches.append(len(x)) or start(self, x)
    )
    whole = net.extract(make_pixels(20), ("pool",))["pool"]
    assert batches == [16, 4]
    batches.clear()
    found = collect(images, net, ("pool",), chunk_size=4)["pool"]
    assert batches == [16, 4]
    np.testing.assert_array_equal(found, whole)
    single = collect(images, net, ("pool",), chunk_size=20)["pool"]
    np.testing.assert_allclose(single, whole, rtol=1e-5)
