import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.decoding import guidance


@pytest.mark.parametrize("num_steps", [1, 2, 8, 13])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_scales_follow_their_formulas(num_steps, scale):
    i, last = np.arange(num_steps, dtype=np.float64), num_steps - 1
    ramp = i / last if last else np.ones(1)
    for schedule, power, expected in [
        ("constant", 1.0, np.full(num_steps, scale)),
        ("linear", 1.0, 1 + (scale - 1) * ramp),
        ("power_cosine", 1.0, 1 + (scale - 1) * (1 - np.cos(np.pi * (i + 1) / num_steps)) / 2),
        (
            "power_cosine",
            2.5,
            1 + (scale - 1) * (1 - np.cos(np.pi * ((i + 1) / num_steps) ** 2.5)) / 2,
        ),
    ]:
        scales = guidance.guidance_scales(schedule, scale, num_steps, power)
        assert scales.dtype == np.float32
        np.testing.assert_allclose(scales, expected, atol=1e-6)
        assert scales[-1] == pytest.approx(scale)


@pytest.mark.parametrize(
    ("interval", "inside"),
    [
        ((0.0, 1.0), range(10)),
        ((0.3, 0.7), range(3, 7)),
        ((0.25, 0.75), range(3, 8)),
        ((0.0, 0.1), range(1)),
        ((0.9, 1.0), range(9, 10)),
    ],
)
@pytest.mark.parametrize("schedule", guidance.GUIDANCE_SCHEDULES)
def test_outside_its_interval_guidance_is_off(schedule, interval, inside):
    whole = guidance.guidance_scales(schedule, 3.5, 10, 1.5)
    scales = guidance.guidance_scales(schedule, 3.5, 10, 1.5, interval)
    expected = [whole[i] if i in inside else 1 for i in range(10)]
    np.testing.assert_array_equal(scales, np.float32(expected))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liner", 2.0, 8), "'liner' is unknown; .*Did you mean 'linear'"),
        (("linear", -0.5, 8), "guidance_scale -0.5 is out of range; allowed: 0 or more"),
        (("linear", float("nan"), 8), "guidance_scale nan"),
        (("power_cosine", 2.0, 8, 0.0), "guidance_power 0.0 is out of range"),
        (("linear", 2.0, 8, 1.0, (0.6, 0.4)), "guidance from 0.6 to 0.4 is no interval"),
        (("linear", 2.0, 8, 1.0, (-0.1, 0.4)), "guidance from -0.1 to 0.4 is no interval"),
        (("linear", 2.0, 10, 1.0, (0.91, 0.99)), "from 0.91 to 0.99 contains none of 10 steps"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        guidance.guidance_scales(*arguments)


@pytest.mark.parametrize("schedule", guidance.GUIDANCE_SCHEDULES)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_steps_are_guided_where_their_scale_is_not_one(schedule, interval):
    arguments = (schedule, 3.0, 8, interval)
    scales = guidance.guidance_scales(schedule, 3.0, 8, interval=interval)
    assert guidance.guided_steps(*arguments) == tuple(scales != 1)
    assert not any(guidance.guided_steps(schedule, 1.0, 8, interval))
    # So near to 1 that it is rounded to it, which must not make another program.
    assert guidance.guided_steps(schedule, 1 + 1e-9, 8, interval) == guidance.guided_steps(
        *arguments
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_guided_logits_are_extrapolated_from_the_unconditional_ones(scale):
    cond, uncond = np.random.default_rng(0).standard_normal((2, 4, 3, 5))
    guided = guidance.guide(
        jnp.asarray(cond, jnp.float32), jnp.asarray(uncond, jnp.float32), jnp.float32(scale)
    )
    np.testing.assert_allclose(guided, uncond + scale * (cond - uncond), atol=1e-5)
