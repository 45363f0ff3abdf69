"""Show a tokenizer against the outputs of its original implementation."""

import jax
import numpy as np
from goldens_lib import golden_image, load_golden

from maskgil_jax.convert import import_state_dict
from maskgil_jax.tokenizers.base import Tokenizer


def check_tokenizer(family, name):
    """Compare latents, codes and pixels of the golden `name`; return the imported tokenizer."""
    golden = load_golden(name)
    config, params = import_state_dict(family, golden.state_dict)
    tokenizer = Tokenizer(config=config, params=params)
    side = golden.config["image_size"]
    images = golden_image((1, side, side, 3), name)

    @jax.jit
    def encode(params, images):
        latents = tokenizer.module.apply({"params": params}, images, method="encode_latents")
        return latents, tokenizer.module.apply({"params": params}, images, method="encode")

    latents, codes = map(np.asarray, encode(tokenizer.params, images))
    expected = golden.arrays["latent"]
    stride = latents.shape[1] // expected.shape[1]
    np.testing.assert_allclose(latents[:, ::stride, ::stride], expected, atol=1e-4, rtol=0)
    clear = golden.arrays["margin"] >= 1e-4
    assert clear.mean() > 0.9
    assert codes.shape == clear.shape
    np.testing.assert_array_equal(codes[clear], golden.arrays["codes"][clear])
    decoded = np.asarray(tokenizer.decode(golden.arrays["decode_codes"]))
    assert decoded.shape == images.shape
    expected = golden.arrays["decoded"]
    stride = side // expected.shape[1]
    np.testing.assert_allclose(decoded[:, ::stride, ::stride], expected, atol=1e-3, rtol=0)
    return tokenizer
