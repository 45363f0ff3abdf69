import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from maskgil_jax import config as schema
from maskgil_jax import sharding
from maskgil_jax.build import models as build_models
from maskgil_jax.build import training as build

quick = pytest.mark.usefixtures("quick_compilation")
MESHES = {
    "one": {"data": 1},
    "data": {"data": 4},
    "fsdp": {"fsdp": 4},
    "tensor": {"tensor": 4},
    "mixed": {"data": 2, "tensor": 2},
    "all": {"fsdp": 2, "tensor": 2},
}


def make_mesh(name):
    count = 1 if name == "one" else 4
    return sharding.make_mesh(MESHES[name], jax.devices()[:count])


def tiny_run(**model):
    config = schema.preset()
    config.model.update(
        num_layers=2,
        width=32,
        num_heads=4,
        mlp_width=64,
        codebook_size=63,
        num_classes=7,
        grid_size=(4, 4),
        dropout=0.0,
        dtype="float32",
    )
    config.model.update(model)
    config.training.batch_size = 8
    config.training.ema_decay = 0.9
    config.optimizer.learning_rate = 1e-2
    return config


def batches(count):
    """Batches with something to learn: nine codes, depending on the label."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        labels = rng.integers(0, 7, 8)
        tokens = 7 * labels[:, None, None] + rng.integers(0, 9, (8, 4, 4))
        yield {"tokens": tokens.astype(np.int32), "label": labels.astype(np.int32)}


@functools.cache
def train(mesh_name, **model):
    """Metrics of four steps, and the state after them."""
    mesh = make_mesh(mesh_name)
    with jax.set_mesh(mesh):
        task = build.make_maskgil_task(tiny_run(**model), mesh)
        state, history = task.init(), []
        for batch in batches(4):
            batch = sharding.put_batch(batch, mesh)
            state, metrics = task.step(state, task.empty_metrics(), batch)
            history.append({name: float(x) for name, x in metrics.compute().items()})
    return history, state


@quick
@pytest.mark.parametrize(
    ("mesh_name", "family"),
    [
        *((name, "maskgil") for name in MESHES if name != "one"),
        *((name, "bidirectional-transformer") for name in ("fsdp", "tensor", "all")),
    ],
)
def test_four_devices_train_as_one_does(mesh_name, family):
    expected, single = train("one", family=family)
    actual, state = train(mesh_name, family=family)
    assert expected[3]["loss"] < expected[0]["loss"] - 0.01
    for a, b in zip(actual, expected, strict=True):
        for name in ("loss", "accuracy", "grad_norm", "param_norm", "output_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(single.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_activations_are_constrained_to_the_mesh():
    mesh = make_mesh("all")
    with jax.set_mesh(mesh):
        task = build.make_maskgil_task(tiny_run(), mesh)
        batch = sharding.put_batch(next(batches(1)), mesh)
        program = task.step.lower(task.abstract, task.empty_metrics(), batch).as_text()
    constraints = [line for line in program.splitlines() if "sdy.sharding_constraint" in line]
    assert any("tensor<8x17x32xf32>" in line and "fsdp" in line for line in constraints)


@quick
@pytest.mark.parametrize("family", ["maskgil", "bidirectional-transformer"])
@pytest.mark.parametrize(("mesh_name", "share"), [("fsdp", 4), ("tensor", 4), ("all", 4)])
def test_state_is_split_over_the_devices(mesh_name, share, family):
    _, state = train(mesh_name, family=family)
    whole = local = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)):
        whole += leaf.nbytes
        local += leaf.addressable_shards[0].data.nbytes
    # The norms, and for some meshes the class table, are on every device.
    assert local < 1.3 * whole / share


def test_logical_axes_lie_where_the_rules_say():
    mesh, config = make_mesh("all"), build_models.model_config(tiny_run())
    boxed = jax.eval_shape(build_models.init_model(config), jax.random.key(0))
    specs = jax.tree.map(lambda s: s.spec, sharding.state_shardings(boxed, mesh))
    layers = specs["transformer"]["layers"]
    assert layers["attention"]["qkv"]["kernel"] == PartitionSpec(None, "fsdp", None, "tensor", None)
    assert layers["attention"]["out"]["kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert layers["mlp"]["gate_up"]["kernel"] == PartitionSpec(None, "fsdp", None, "tensor")
    assert layers["mlp"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs["head"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert specs["token_embed"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert not any(layers["mlp_norm"]["scale"])


def test_what_does_not_divide_is_replicated():
    mesh = make_mesh("all")
    boxed = {
        "odd": nn.LogicallyPartitioned(
            jax.ShapeDtypeStruct((65, 32), jnp.float32), ("vocab", "embed")
        ),
        "bare": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    found = sharding.state_shardings(boxed, mesh)
    assert found["odd"].spec == PartitionSpec(None, "fsdp")
    assert found["bare"].spec == PartitionSpec()


def test_an_axis_without_a_rule_is_an_error():
    box = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((8,), jnp.float32), ("embd",))
    with pytest.raises(ValueError, match=r"logical axes \['embd'\] have no rule; allowed: batch"):
        sharding.state_shardings({"w": box}, make_mesh("one"))


def test_one_axis_of_the_mesh_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh({"data": -1, "tensor": 2}).shape) == {
        "data": 2,
        "fsdp": 1,
        "tensor": 2,
    }
    assert dict(sharding.make_mesh({"fsdp": -1}).shape)["fsdp"] == 4
    assert sharding.batch_shards(make_mesh("all")) == 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3}, "needs 3 devices or a multiple, but there are 4"),
        ({"data": -1, "fsdp": 3}, "but there are 4"),
        ({"data": -1, "tensor": 8}, "but there are 4"),
        ({"data": -1, "fsdp": -1}, "at most one may be -1"),
        ({"data": 0}, "sizes must be at least 1"),
        (
            {"data": 4, "model": 1},
            r"mesh axes \['model'\] are unknown; allowed: data, fsdp, tensor",
        ),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape)


def test_batches_that_do_not_divide_are_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"batch 6 is not divisible by 4 .*for example 8"):
        sharding.check_batch_size("batch", 6, make_mesh("data"))
    with pytest.raises(ValueError, match="batch 0 is not divisible"):
        sharding.check_batch_size("batch", 0, make_mesh("one"))
    sharding.check_batch_size("batch", 6, make_mesh("tensor"))


def test_batches_are_split_by_rows():
    batch = sharding.put_batch({"label": np.arange(8)}, make_mesh("data"))
    rows = [shard.data.tolist() for shard in batch["label"].addressable_shards]
    assert sorted(rows) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("name", ["one", "data", "all"])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_rows_are_mapped_alone_where_they_lie(name, count):
    rng, mesh = np.random.default_rng(0), make_mesh(name)
    weights = rng.standard_normal((300, 40)).astype(np.float32)
    rows = {"x": rng.standard_normal((8, 3, 300)).astype(np.float32), "at": np.arange(8)}

    def multiply(weights, row):
        assert row["x"].shape == (1, 3, 300)
        return {"y": row["x"] @ weights[None], "at": row["at"] + 1}

    @jax.jit
    def run(weights, rows, count):
        return sharding.map_rows(mesh, multiply, weights, rows, count)

    made = run(weights, rows, count)
    alone = [
        jax.jit(multiply)(weights, {k: v[i : i + 1] for k, v in rows.items()}) for i in rows["at"]
    ]
    for key, values in made.items():
        expected = np.concatenate([row[key] for row in alone])
        np.testing.assert_array_equal(values[:count], expected[:count])
        assert not np.any(values[count:])
    lying = made["y"].sharding.shard_shape(made["y"].shape)[0]
    assert lying == 8 // sharding.batch_shards(mesh)


def count_devices(batch_size, first="", **environment):
    code = f"import jax; from maskgil_jax import sharding; {first}"
    code += f"sharding.split_cpu({batch_size}); print(len(jax.devices()))"
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("batch_size", "environment", "expected"),
    [
        (840, {}, min(len(os.sched_getaffinity(0)), 8)),  # 1 to 8 all divide it
        (1, {}, 1),
        (840, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (840, {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
def test_a_cpu_is_split_into_cores_unless_the_environment_chose(batch_size, environment, expected):
    done = count_devices(batch_size, **environment)
    assert done.stdout == f"{expected}\n", done.stderr


def test_a_cpu_that_is_in_use_is_not_split():
    done = count_devices(2, first="jax.devices(); ")
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
