import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.tokenizers import discriminator
from maskgil_jax.tokenizers.discriminator import DiscriminatorConfig, PatchGAN

LAYERS, CHANNELS = 3, 4


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 32, 40, 3)), jnp.float32)


@pytest.fixture(scope="module")
def gan(images):
    module = PatchGAN(DiscriminatorConfig(layers=LAYERS, channels=CHANNELS))
    return module, module.init(jax.random.key(0), images)["params"]


def torch_patchgan(torch, params):
    """The published net, written in its terms: convolutions of 4, batch norms, leaky ReLUs."""
    nn, steps = torch.nn, []
    for index in range(LAYERS + 2):
        kernel = np.asarray(params[f"conv_{index}"]["kernel"]).transpose(3, 2, 0, 1)
        bias = params[f"conv_{index}"].get("bias")
        stride = 2 if index < LAYERS else 1
        conv = nn.Conv2d(*kernel.shape[1::-1], 4, stride, 1, bias=bias is not None)
        conv.weight.data = torch.from_numpy(kernel.copy())
        if bias is not None:
            conv.bias.data = torch.from_numpy(np.array(bias))
        steps.append(conv)
        if 0 < index <= LAYERS:
            norm = nn.BatchNorm2d(kernel.shape[0])
            norm.weight.data = torch.from_numpy(np.array(params[f"norm_{index}"]["scale"]))
            norm.bias.data = torch.from_numpy(np.array(params[f"norm_{index}"]["bias"]))
            steps.append(norm)
        if index <= LAYERS:
            steps.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*steps).train()


def test_logits_and_gradients_are_those_of_the_torch_net(gan, images):
    torch = pytest.importorskip("torch")
    module, params = gan
    # At their initial size the logits hardly differ from the last bias.
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 4 else x + 0.1, params)
    peer = torch_patchgan(torch, params)
    there = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2))).requires_grad_()
    expected = peer(there)
    logits, pull = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, images)
    expected = expected[:, 0]
    assert logits.shape == (3, 2, 3)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-4, atol=1e-4)
    weights = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    (expected * torch.from_numpy(weights)).sum().backward()
    by_params, by_images = pull(jnp.asarray(weights))
    np.testing.assert_allclose(
        by_images, there.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4
    )
    kernel = peer[0].weight.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(by_params["conv_0"]["kernel"], kernel, rtol=1e-3, atol=1e-3)


def test_initial_values_and_widths(images):
    module = PatchGAN(DiscriminatorConfig(layers=4, channels=16))
    big = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    widths = [big[f"conv_{index}"]["kernel"].shape[-1] for index in range(6)]
    assert widths == [16, 32, 64, 128, 128, 1]
    assert [name for name in big if "bias" in big[name] and "conv" in name] == ["conv_0", "conv_5"]
    params = PatchGAN(DiscriminatorConfig(layers=1)).init(jax.random.key(0), images)["params"]
    assert np.std(params["conv_1"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.mean(params["norm_1"]["scale"]) == pytest.approx(1.0, abs=0.01)
    assert np.std(params["norm_1"]["scale"]) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_and_nothing_else(layers, field):
    config = DiscriminatorConfig(layers=layers, channels=2)
    assert config.receptive_field == field
    side = 16 * 2**layers
    images = jnp.zeros((1, side, side, 3))
    module = PatchGAN(config)
    params = module.init(jax.random.key(0), images)["params"]
    # Every norm shares statistics over the image; by its fixed scale alone it passes on no pixel.
    params = {name: value for name, value in params.items() if "norm" not in name}

    def middle(images):
        x = images
        for index in range(layers + 2):
            stride = 2 if index < layers else 1
            x = jax.lax.conv_general_dilated(
                x,
                jnp.abs(params[f"conv_{index}"]["kernel"]),
                (stride, stride),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return x[0, x.shape[1] // 2, x.shape[2] // 2, 0]

    seen = np.abs(jax.grad(middle)(images))[0].max((1, 2)) > 0
    assert seen.sum() == field


def test_statistics_are_those_of_the_whole_batch(gan, images):
    module, params = gan
    together = module.apply({"params": params}, images)
    alone = module.apply({"params": params}, images[:1])
    assert np.abs(together[:1] - alone).max() > 1e-6
    mesh = jax.make_mesh((3,), ("data",), devices=jax.devices()[:3])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    apply = jax.jit(lambda x: module.apply({"params": params}, x))
    sharded = apply(jax.device_put(images, split))
    np.testing.assert_allclose(sharded, together, rtol=1e-4, atol=1e-6)


def test_losses_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(0, 2, (2, 4, 3, 3))
    hinge = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    vanilla = 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean())
    arrays = jnp.asarray(real, jnp.float32), jnp.asarray(fake, jnp.float32)
    for kind, expected in (("hinge", hinge), ("vanilla", vanilla)):
        found = discriminator.find_discriminator_loss(kind)(*arrays)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(discriminator.generator_loss(arrays[1]), -fake.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="'hinged' is unknown; .*Did you mean 'hinge'"):
        discriminator.find_discriminator_loss("hinged")


def test_settings_that_fit_no_image_are_refused():
    for field in ("layers", "channels"):
        with pytest.raises(ValueError, match=f"discriminator {field} is 0"):
            DiscriminatorConfig(**{field: 0})
    DiscriminatorConfig(layers=3).check_images(24, 32)
    with pytest.raises(ValueError, match=r"layers is 4: an image height of 32 .*use at most 3"):
        DiscriminatorConfig(layers=4).check_images(32, 64)
    with pytest.raises(ValueError, match="use images of at least 6 pixels"):
        DiscriminatorConfig(layers=1).check_images(8, 4)
