"""Both nets behind one face."""

import jax
import numpy as np
import pytest
from fake_evaluation import make_pixels

from maskgil_jax.checkpoints import write_model_dir
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals import digit_net
from maskgil_jax.evals.inception import InceptionConfig
from maskgil_jax.evaluation.nets import FeatureNet, describe_net, open_net


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = InceptionConfig(channels=2, num_logits=5)
    module, rng = config.make_module(), np.random.default_rng(0)
    images = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32) / 10, shapes)
    path = tmp_path_factory.mktemp("net") / "inception"
    write_model_dir(
        path, kind="evaluator", family=config.family, config=config.to_dict(), params=params
    )
    return path


def test_the_net_of_digits_reads_them():
    net = open_net("digit-net", None)
    assert isinstance(net, FeatureNet)
    images, labels = digits_arrays("test")
    features = net.extract(images, ("pool", "logits", "pixels"))
    assert {name: x.shape for name, x in features.items()} == {
        name: (297, width) for name, width in net.widths.items()
    }
    assert np.mean(features["logits"].argmax(1) == labels) > 0.97
    np.testing.assert_array_equal(features["pixels"].reshape(images.shape), images)
    # However images are batched.
    np.testing.assert_array_equal(
        net.extract(images[260:], ("pool",))["pool"], features["pool"][260:]
    )
    assert describe_net(net) == describe_net(open_net("digit-net", None))
    assert len(net.fingerprint) == 64


def test_its_features_are_what_the_formulas_say():
    """NumPy in float64, one convolution at a time."""
    params, image = digit_net.init_params(3), digits_arrays("test")[0][:1]
    x = image.mean(-1)[0][..., None] / 255
    for number in range(3):
        kernel = params[f"conv{number}"]["kernel"].astype(np.float64)
        side, before = len(x) // 2, (len(kernel) - 2) // 2
        x = np.pad(x, [(before, len(kernel))] * 2 + [(0, 0)])
        windows = [
            [x[2 * i : 2 * i + len(kernel), 2 * j : 2 * j + len(kernel)] for j in range(side)]
            for i in range(side)
        ]
        x = np.maximum(np.einsum("ijklm,klmo->ijo", np.array(windows), kernel), 0)
    pool = np.maximum(x.reshape(-1) @ params["features"]["kernel"], 0)
    found = digit_net.read_digits(params, jax.numpy.asarray(image))
    np.testing.assert_allclose(found["pool"][0], pool, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["logits"][0], pool @ params["logits"]["kernel"], rtol=1e-4, atol=1e-5
    )


def test_inception_takes_any_size(weights, quick_compilation):
    net = open_net("inception-fid", weights)
    assert isinstance(net, FeatureNet)
    net.check_shape("samples", (20, 30, 3))
    features = net.extract(make_pixels(3, shape=(20, 30, 3)), ("pool",))
    assert features["pool"].shape == (3, net.widths["pool"])
    assert "no figure is comparable" in net.notes[0]
    assert "299×299" in net.resize


def test_what_a_net_cannot_take_is_refused(weights):
    with pytest.raises(ValueError, match="samples: images have 16×16 pixels, 3 channels; .* 32×32"):
        open_net("digit-net", None).check_shape("samples", (16, 16, 3))
    with pytest.raises(ValueError, match="--inception is for protocols on Inception's features"):
        open_net("digit-net", weights)
    with pytest.raises(
        ValueError,
        match="need --inception: pt_inception-2015.* https://.* --protocol digits needs no",
    ):
        open_net("inception-fid", None)
    with pytest.raises(ValueError, match="takes RGB"):
        open_net("inception-fid", weights).check_shape("samples", (16, 16, 1))
