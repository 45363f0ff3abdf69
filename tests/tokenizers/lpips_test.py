import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from maskgil_jax.checkpoints import read_model_dir
from maskgil_jax.convert import ConversionError, import_state_dict
from maskgil_jax.convert.files import write_checkpoint
from maskgil_jax.tokenizers.lpips import LEVELS, LPIPSConfig
from tools import convert_checkpoint

WIDTHS = (4, 6, 8, 10, 12)


def vgg_state(widths=WIDTHS, seed=0):
    """Random weights under torchvision's names, with the classifier that its file also holds."""
    rng, state, before = np.random.default_rng(seed), {}, 3
    for places, width in zip(LEVELS, widths, strict=True):
        for place in places:
            kernel = rng.standard_normal((width, before, 3, 3)) * np.sqrt(2 / (9 * before))
            state[f"features.{place}.weight"] = kernel.astype(np.float32)
            state[f"features.{place}.bias"] = rng.normal(0, 0.1, width).astype(np.float32)
            before = width
    return state | {"classifier.0.weight": np.zeros((5, 7), np.float32)}


def head_state(widths=WIDTHS, seed=1):
    rng = np.random.default_rng(seed)
    return {
        f"lin{level}.model.1.weight": rng.uniform(0, 1, (1, width, 1, 1)).astype(np.float32)
        for level, width in enumerate(widths)
    }


@pytest.fixture(scope="module")
def lpips():
    config, params = import_state_dict("lpips", vgg_state() | head_state())
    return config.make_module(), params


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(2)
    one = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    other = np.clip(one + 0.2 * rng.standard_normal(one.shape), -1, 1)
    return jnp.asarray(one), jnp.asarray(other, jnp.float32)


def torch_lpips(torch, state, one, other):
    """LPIPS as published, written with torch's functions."""
    functional = torch.nn.functional
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def features(x):
        x, taps = (x - shift) / scale, []
        for level, places in enumerate(LEVELS):
            x = functional.max_pool2d(x, 2) if level else x
            for place in places:
                weight, bias = (state[f"features.{place}.{part}"] for part in ("weight", "bias"))
                x = torch.relu(functional.conv2d(x, weight, bias, padding=1))
            taps.append(x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10))
        return taps

    total = 0
    for level, (a, b) in enumerate(zip(features(one), features(other), strict=True)):
        weighted = functional.conv2d((a - b) ** 2, state[f"lin{level}.model.1.weight"])
        total = total + weighted.mean((1, 2, 3))
    return total


def test_distances_and_gradients_are_those_of_the_torch_code(lpips, pair):
    torch = pytest.importorskip("torch")
    module, params = lpips
    state = {key: torch.from_numpy(value) for key, value in (vgg_state() | head_state()).items()}
    one, other = (torch.from_numpy(np.array(x.transpose(0, 3, 1, 2))) for x in pair)
    other.requires_grad_()
    expected = torch_lpips(torch, state, one, other)
    expected.sum().backward()
    found, pull = jax.vjp(lambda x: module.apply({"params": params}, pair[0], x), pair[1])
    assert (expected > 0.01).all()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4)
    (gradient,) = pull(jnp.ones(2))
    there = other.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, there, rtol=1e-3, atol=1e-6)


def test_equal_images_have_no_distance_and_finite_gradients(lpips, pair):
    module, params = lpips
    # A net without any active unit divides by lengths of zero.
    silent = jax.tree.map(lambda x: x * 0 - 1 if x.ndim == 1 else x, params)
    for weights in (params, silent):

        def distance(x, weights=weights):
            return jnp.sum(module.apply({"params": weights}, x, pair[0]))

        value, gradient = jax.value_and_grad(distance)(pair[0])
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_the_two_published_files_become_one_model_directory(tmp_path, capsys):
    write_checkpoint(tmp_path / "vgg16.safetensors", vgg_state(), wrapper="")
    write_checkpoint(tmp_path / "vgg.safetensors", head_state(), wrapper="")
    arguments = ["import", "--family", "lpips", "--src", str(tmp_path / "vgg16.safetensors")]
    arguments += ["--dst", str(tmp_path / "lpips")]
    assert convert_checkpoint.main(arguments) == 1
    assert "missing lin0.model.1.weight [1, 4, 1, 1]" in capsys.readouterr().err
    assert not (tmp_path / "lpips").exists()
    assert convert_checkpoint.main([*arguments, "--heads", str(tmp_path / "vgg.safetensors")]) == 0
    found = read_model_dir(tmp_path / "lpips")
    assert (found.kind, found.family, found.config) == (
        "perceptual",
        "lpips",
        {"widths": list(WIDTHS)},
    )
    leaves = flatten_dict(found.params, sep="/")
    assert sorted(leaves)[:2] == ["heads/lin_0/kernel", "heads/lin_1/kernel"]
    kernel = vgg_state()["features.12.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(leaves["vgg/conv_12/kernel"], kernel)
    other = ["import", "--family", "llamagen-vq", "--src", "vq.pt", "--dst", str(tmp_path / "vq")]
    assert convert_checkpoint.main([*other, "--heads", "x.pt"]) == 1
    assert "--heads x.pt is for --family lpips" in capsys.readouterr().err


def test_the_published_widths_are_the_default():
    widths = LPIPSConfig().widths
    state = {
        key: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for key, value in (vgg_state() | head_state()).items()
    }
    assert widths == (64, 128, 256, 512, 512)
    abstract = jax.eval_shape(
        LPIPSConfig().make_module().init, jax.random.key(0), *jnp.zeros((2, 1, 16, 16, 3))
    )["params"]
    # 14,714,688 of VGG16's convolutions and 1,472 of the heads, as the published files have.
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 14_714_688 + 1_472
    state["features.0.weight"] = jax.ShapeDtypeStruct((5, 3, 3, 3), "float32")
    with pytest.raises(ConversionError, match=r"wrong shape of features\.0\.weight"):
        import_state_dict("lpips", state)


def test_what_is_not_allowed_is_named(lpips):
    with pytest.raises(ValueError, match=r"widths is \(64,\); give 5 numbers"):
        LPIPSConfig(widths=(64,))
    with pytest.raises(ValueError, match="has no field 'width'; did you mean 'widths'"):
        LPIPSConfig.from_dict({"width": 3})
    module, params = lpips
    with pytest.raises(ValueError, match="at least 16 × 16"):
        module.apply({"params": params}, *jnp.zeros((2, 1, 8, 8, 3)))
