"""What a sweep is asked for is read, and refused where one setting would override another."""

import re

import pytest

import maskgil_jax
from tools import sweep_digits


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("loaded before the arguments were checked")

    monkeypatch.setattr(maskgil_jax.ImageGenerator, "from_checkpoint", load)


def test_settings_have_the_types_of_the_sampler():
    text = "order=halton,num_steps=4,guidance_scale=2,halton_roll=true,rescale=false"
    settings = sweep_digits.parse_settings(text)
    assert settings == {
        "order": "halton",
        "num_steps": 4,
        "guidance_scale": 2.0,
        "halton_roll": True,
        "rescale": False,
    }
    kinds = {"num_steps": int, "guidance_scale": float, "halton_roll": bool}
    assert all(type(settings[name]) is kind for name, kind in kinds.items())
    maskgil_jax.SamplerConfig(**settings)  # accepts them
    assert sweep_digits.parse_settings("") == {}


def test_a_sweep_is_one_change_per_value():
    assert sweep_digits.parse_sweep("num_steps=4,8") == [{"num_steps": 4}, {"num_steps": 8}]
    assert sweep_digits.parse_sweep("order=random") == [{"order": "random"}]


def test_a_plan_names_its_sets():
    changes = [[{"num_steps": 4}, {"num_steps": 8}], [{"top_k": 0}, {"top_k": 3}]]
    sets, sweeps = sweep_digits.parse_plan(
        ["", "order=halton,temperature=0.5"], ["num_steps=4,8", "top_k=0,3"]
    )
    assert sets == {
        "as in the run": {},
        "order=halton,temperature=0.5": {"order": "halton", "temperature": 0.5},
    }
    assert sweeps == changes
    assert sweep_digits.parse_plan([], []) == ({"as in the run": {}}, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler=halton"], "--sampler 'halton': write field=value, such as order=halton"),
        (["--sampler=steps=4"], "sampler setting 'steps' is unknown; allowed: num_steps, "),
        (["--sampler=num_steps=4.5"], "num_steps=4.5: '4.5' is no int"),
        (["--sampler=rescale=yes"], "rescale 'yes' is unknown; allowed: true, false"),
        (
            ["--sampler=num_steps=4,num_steps=8"],
            "--sampler 'num_steps=4,num_steps=8' gives num_steps twice; give it once",
        ),
        (["--sweep=num_steps"], "--sweep 'num_steps': write field=value,value"),
        (["--sweep=num_steps=4,"], "num_steps=: '' is no int"),
        (["--sweep=step=4"], "sampler setting 'step' is unknown"),
        (
            ["--sampler=order=halton", "--sampler=top_k=2,num_steps=4", "--sweep=num_steps=4,8"],
            "--sampler 'top_k=2,num_steps=4' sets num_steps, which --sweep 'num_steps=4,8' varies; "
            "give it in one of them",
        ),
        (
            ["--sweep=num_steps=4,8", "--sweep=top_k=1", "--sweep=num_steps=16"],
            "two --sweep vary num_steps; give all its values in one",
        ),
        (["--num_samples=3"], "--num_samples 3 is too few; give 4 or more"),
        (["--plot=a.png"], "--plot needs one --sweep, not 0"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(message)}"):
        sweep_digits.main(["--workdir=nowhere", *arguments])


def test_the_fewest_samples_are_enough():
    arguments = ["--workdir=nowhere", "--num_samples=4", "--sweep=num_steps=4"]
    with pytest.raises(AssertionError, match="loaded"):
        sweep_digits.main(arguments)
