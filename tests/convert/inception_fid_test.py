"""The published file, or a model directory made from it, becomes the net of FID."""

import jax
import numpy as np
import pytest

from maskgil_jax import loading
from maskgil_jax.convert import (
    ConversionError,
    detect_family,
    export_state_dict,
    find_family,
    import_state_dict,
)
from maskgil_jax.convert.files import write_checkpoint
from maskgil_jax.evals.inception import InceptionConfig
from tools import convert_checkpoint

CONFIG = InceptionConfig(channels=2, num_logits=7)


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(0)
    template = find_family("inception-fid").abstract_tree(CONFIG)
    params: dict = {}
    for path, leaf in template.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = rng.standard_normal(leaf.shape, np.float32)
    return export_state_dict("inception-fid", CONFIG, params)


def with_counters(state):
    names = [key.removesuffix("running_var") for key in state if key.endswith("running_var")]
    assert len(names) == 94
    return state | {f"{name}num_batches_tracked": np.zeros((), np.int64) for name in names}


@pytest.fixture
def file(state, tmp_path):
    path = tmp_path / "inception.safetensors"
    write_checkpoint(path, with_counters(state), wrapper="")
    return path


def test_the_file_and_the_directory_made_from_it_are_the_same_net(file, state, tmp_path, capsys):
    directory = tmp_path / "inception"
    assert convert_checkpoint.main(["import", "--src", str(file), "--dst", str(directory)]) == 0
    output = capsys.readouterr().out
    assert "ignored 94 counters of training steps" in output
    assert "family: inception-fid" in output
    one, other = loading.load_inception(file), loading.load_inception(directory)
    assert one.config == other.config == CONFIG
    assert one.fingerprint == other.fingerprint
    assert one.sha256 == other.sha256
    assert not one.is_published
    kernel = state["Mixed_6b.branch7x7_2.conv.weight"].transpose(2, 3, 1, 0)
    for found in (one, other):
        np.testing.assert_array_equal(found.params["Mixed_6b"]["branch7x7_2"]["kernel"], kernel)
    changed = state | {"fc.bias": state["fc.bias"] + 1}
    write_checkpoint(tmp_path / "changed.safetensors", changed, wrapper="")
    assert loading.load_inception(tmp_path / "changed.safetensors").fingerprint != one.fingerprint
    exported = tmp_path / "back.safetensors"
    assert convert_checkpoint.main(["export", "--src", str(directory), "--dst", str(exported)]) == 0
    assert loading.load_inception(exported).fingerprint == one.fingerprint


def test_a_pickle_is_read_as_published(state, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "inception.pth"
    torch.save({key: torch.tensor(value) for key, value in with_counters(state).items()}, path)
    found = loading.load_inception(path)
    np.testing.assert_array_equal(found.params["fc"]["kernel"], state["fc.weight"].T)


def test_the_published_shape_is_the_default():
    leaves = find_family("inception-fid").abstract_tree(InceptionConfig()).values()
    # 472 tensors of 23,885,392 numbers, as the published file has beside its counters.
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (472, 23_885_392)
    state = {
        key: jax.ShapeDtypeStruct(shape, "float32")
        for key, shape in {"fc.weight": (1008, 2048), "fc.bias": (1008,)}.items()
    }
    with pytest.raises(ConversionError, match="the width cannot be inferred"):
        import_state_dict("inception-fid", state)


def test_counters_without_their_norm_are_strangers(state):
    stray = {"Mixed_9z.bn.num_batches_tracked": np.zeros((), np.int64)}
    with pytest.raises(ConversionError, match="unexpected Mixed_9z"):
        import_state_dict("inception-fid", state | stray)
    assert detect_family(with_counters(state)).family == "inception-fid"


def test_torchvisions_own_inception_is_refused(state):
    # It has an auxiliary classifier, and as many classes as ImageNet.
    torchvision = state | {"AuxLogits.fc.bias": np.zeros(1000, np.float32)}
    with pytest.raises(ConversionError, match=r"unexpected AuxLogits\.fc\.bias"):
        import_state_dict("inception-fid", torchvision)
    odd = {key: value for key, value in state.items() if "Conv2d_1a" not in key}
    odd |= {"Conv2d_1a_3x3.conv.weight": np.zeros((3, 3, 3, 3), np.float32)}
    odd |= {"Conv2d_2a_3x3.conv.weight": np.zeros((3, 3, 3, 3), np.float32)}
    with pytest.raises(ConversionError, match="make no inception-fid: channels 3 must be even"):
        import_state_dict("inception-fid", odd)


def test_what_is_no_such_net_is_refused(state, tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"no\.pth does not exist; give pt_inception-2015"):
        loading.load_inception(tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match="is not a model directory"):
        loading.load_inception(tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        loading.load_inception(cut)
    fewer = {key: value for key, value in state.items() if key != "Mixed_7c.branch1x1.bn.bias"}
    write_checkpoint(tmp_path / "fewer.safetensors", fewer, wrapper="")
    with pytest.raises(ConversionError, match=r"missing Mixed_7c\.branch1x1\.bn\.bias \[20\]"):
        loading.load_inception(tmp_path / "fewer.safetensors")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ConversionError, match="has the suffix '.txt'; allowed"):
        loading.load_inception(tmp_path / "text.txt")


def test_a_directory_of_another_family_is_refused():
    with pytest.raises(ValueError, match="holds a tokenizer of family 'llamagen-vq'.*'inception"):
        loading.load_inception(loading.build.resolve_path("asset:digits_tokenizer"))
