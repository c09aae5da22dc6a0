import errno
import json
import os
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import CONFIG_FILE, TENSOR_FILE, load_peft, peek_peft, save_peft

Q = "base_model.model.layers.0.q"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


def sound_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        f"{Q}.lora_A.weight": torch.randn(2, 6, generator=generator),
        f"{Q}.lora_B.weight": torch.randn(5, 2, generator=generator),
    }


def write(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    save_file(sound_tensors() | (tensors or {}), folder / TENSOR_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | config))
    return folder


def refusal(folder, *, peek=True):
    """The one message with which loading and peeking refuse."""
    with pytest.raises(AdapterFormatError) as loading:
        load_peft(folder)
    if peek:
        with pytest.raises(AdapterFormatError) as peeking:
            peek_peft(folder)
        assert str(peeking.value) == str(loading.value)
    return str(loading.value)


def load_or_message(folder):
    """The folder if it holds a sound adapter, or else why not. Any other exception is a bug."""
    try:
        load_peft(folder).validate()
    except AdapterFormatError as error:
        return str(error)
    return str(folder)


def test_a_sound_directory_is_read(tmp_path):
    adapter = load_peft(write(tmp_path / "alice", base_model_name_or_path="some/model"))
    [(site, pair)] = adapter.sites.items()
    assert (site, pair.rank, pair.in_features, pair.out_features, pair.scaling) == (
        "layers.0.q",
        2,
        6,
        5,
        2.0,
    )
    assert torch.equal(pair.lora_a, sound_tensors()[f"{Q}.lora_A.weight"])
    assert (adapter.name, adapter.base_model) == ("alice", "some/model")
    by_file = load_peft(tmp_path / "alice" / TENSOR_FILE, name="bob")
    assert (by_file.name, by_file.identity) == ("bob", adapter.identity)


def test_peek_reads_no_weights(tmp_path):
    folder = write(tmp_path / "alice")
    whole = peek_peft(folder)
    size = (folder / TENSOR_FILE).stat().st_size
    with (folder / TENSOR_FILE).open("r+b") as file:
        file.seek(size - 8)
        file.write(b"\xff" * 8)  # NaN
    assert peek_peft(folder) == whole
    assert "NaN" in refusal(folder, peek=False)


def test_a_name_of_a_tensor_that_is_no_lora_of_a_linear_or_conv_is_explained(tmp_path):
    foreign = {
        f"{Q}.lora_magnitude_vector": "DoRA",
        f"{Q}.lora_magnitude_vector.weight": "DoRA",
        "base_model.model.embed.lora_embedding_A": "LoRA of an embedding",
        f"{Q}.lora_B.bias": "bias of lora_B",
        f"{Q}.lora_A.default.weight": "holds the adapter's name",
        "base_model.model.lm_head.base_layer.weight": "weight of the base model",
        "base_model.model.classifier.weight": "modules_to_save",
        "layers.0.q.lora_A.weight": "begin with 'base_model.model.'",
        "unet.down.0.lora_down.weight": "kohya",
        "lora_unet_mid.alpha": "kohya",
    }
    for name, reason in foreign.items():
        message = refusal(write(tmp_path, {name: torch.ones(2, 6)}))
        assert name in message
        assert reason in message, message


def test_half_a_pair_is_refused_and_so_is_none(tmp_path):
    folder = write(tmp_path)
    save_file({f"{Q}.lora_A.weight": torch.ones(2, 6)}, folder / TENSOR_FILE)
    assert "site 'layers.0.q' has a lora_A and no lora_B" in refusal(folder)
    save_file({f"{Q}.lora_B.weight": torch.ones(6, 2)}, folder / TENSOR_FILE)
    assert "site 'layers.0.q' has a lora_B and no lora_A" in refusal(folder)
    save_file({}, folder / TENSOR_FILE)
    assert "holds no LoRA tensor" in refusal(folder)


def test_weights_that_contradict_the_config_are_refused(tmp_path):
    assert "gives site 'layers.0.q' rank 3, but lora_A is [2, 6]" in refusal(write(tmp_path, r=3))
    assert "rank 7" in refusal(write(tmp_path, rank_pattern={"q": 7}))
    assert "there are weights for site 'layers.0.q', but target_modules" in refusal(
        write(tmp_path, target_modules=["v"])
    )
    assert "but layers_to_transform is [1], without its layer, 0" in refusal(
        write(tmp_path, layers_to_transform=[1], layers_pattern="layers")
    )
    assert "rank 2, but lora_A is [2, 6] and lora_B is [5, 3]" in refusal(
        write(tmp_path, {f"{Q}.lora_B.weight": torch.ones(5, 3)})
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 6), (5, 2, 1, 1)),
        ((2, 3, 3), (5, 2, 1)),  # Conv1d
        ((2, 3, 3, 3, 3), (5, 2, 1, 1, 1)),  # Conv3d
        ((2, 3, 3, 3), (5, 2, 3, 3)),
        ((2,), (5, 2)),
        ((2, 0), (5, 2)),
    ],
)
def test_shapes_of_neither_a_linear_nor_a_conv2d_are_refused(a, b, tmp_path):
    tensors = {f"{Q}.lora_A.weight": torch.ones(a), f"{Q}.lora_B.weight": torch.ones(b)}
    assert f"has lora_A {list(a)} and lora_B {list(b)}; expected" in refusal(write(tmp_path, tensors))


def test_a_grouped_conv_is_refused(tmp_path):
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{Q}.lora_B.weight": torch.ones(6, 1, 1, 1)}
    assert "rank 2, but lora_A is [2, 4, 3, 3] and lora_B is [6, 1, 1, 1]" in refusal(
        write(tmp_path, tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype, tmp_path):
    tensors = {f"{Q}.lora_A.weight": torch.ones(2, 6).to(dtype)}
    assert "expected one of ['BF16', 'F16', 'F32']" in refusal(write(tmp_path, tensors))


def test_mixed_dtypes_are_promoted_to_one_that_holds_all_exactly(tmp_path):
    a, b = (tensor.clone() for tensor in sound_tensors().values())
    half, brain = a.half(), b.bfloat16()
    folder = write(tmp_path, {f"{Q}.lora_A.weight": half, f"{Q}.lora_B.weight": brain})
    pair = load_peft(folder).sites["layers.0.q"]
    assert pair.lora_a.dtype == pair.lora_b.dtype == peek_peft(folder).dtype == torch.float32
    assert torch.equal(pair.lora_a.half(), half)
    assert torch.equal(pair.lora_b.bfloat16(), brain)
    uniform = write(tmp_path, {f"{Q}.lora_A.weight": a.bfloat16(), f"{Q}.lora_B.weight": brain})
    assert load_peft(uniform).dtype == torch.bfloat16


def test_values_that_are_no_numbers_are_refused(tmp_path):
    bad = sound_tensors()[f"{Q}.lora_A.weight"]
    bad[1, 1] = torch.nan
    message = refusal(write(tmp_path / "alice", {f"{Q}.lora_A.weight": bad}), peek=False)
    assert "adapter 'alice', site 'layers.0.q': lora_a holds NaN or Inf in 1 of 12" in message


def test_what_is_no_adapter_directory(tmp_path):
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        load_peft(tmp_path / "nowhere")
    folder = tmp_path / "alice"
    folder.mkdir()
    assert "has no adapter_config.json; it holds nothing; expected" in refusal(folder)
    (folder / CONFIG_FILE).write_text("{}")
    assert "has no adapter_model.safetensors; it holds ['adapter_config.json']" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    message = refusal(folder)
    assert "adapter_model.bin is a pickle, which can run code" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '"text"', "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    folder = write(tmp_path)
    (folder / CONFIG_FILE).write_text(text)
    assert CONFIG_FILE in refusal(folder)


def test_a_truncated_file_is_named_with_its_size_and_what_its_header_says(tmp_path):
    folder = write(tmp_path)
    data = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(data[:-3])
    message = refusal(folder)
    assert f"is truncated: it has {len(data) - 3} bytes, its header describes 2 tensors" in message
    assert f"end at byte {len(data)}" in message
    for size in range(0, len(data), 3):
        (folder / TENSOR_FILE).write_bytes(data[:size])
        assert f"{size} bytes" in refusal(folder)
    (folder / TENSOR_FILE).write_bytes(data + b"\x00")
    assert "goes on after its content" in refusal(folder)


@pytest.mark.parametrize("entry", ['"shape":[1e999]', '"data_offsets":[0,1e999]'])
def test_a_header_of_infinite_sizes_is_refused(tmp_path, entry):
    folder = write(tmp_path)
    header = f'{{"{Q}.lora_A.weight":{{"dtype":"F32","shape":[1],"data_offsets":[0,4],{entry}}}}}'.encode()
    (folder / TENSOR_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "broken header" in refusal(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, file):
    folder = write(tmp_path)
    (folder / file).unlink()
    (folder / file).mkdir()
    for read in (load_peft, peek_peft):
        with pytest.raises(
            AdapterUnavailableError, match=f"{folder / file}' cannot be read: Is a directory"
        ):
            read(folder)


def test_a_folder_that_may_not_be_listed_is_named_with_the_reason(tmp_path, monkeypatch):
    folder = write(tmp_path / "alice")

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "listdir", refuse)
    for read in (load_peft, peek_peft):
        with pytest.raises(AdapterUnavailableError, match=f"'{folder}' cannot be read: Permission denied"):
            read(folder)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_the_header_is_refused_or_harmless(tmp_path, data):
    folder = write(tmp_path)
    path = folder / TENSOR_FILE
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert str(folder) in load_or_message(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*CONFIG, "rank_pattern", "alpha_pattern", "layers_to_transform", "bias"]),
    value=JSON,
)
def test_any_value_in_the_config_is_refused_or_read(tmp_path, key, value):
    folder = write(tmp_path, **{key: value})
    assert str(folder) in load_or_message(folder)


SITES = st.lists(st.sampled_from(["q", "v", "0", "1", "a+b", "x[y]"]), min_size=1, max_size=3).map(".".join)


@st.composite
def adapters(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    use_rslora = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    sites = {}
    for site in draw(st.lists(SITES, min_size=1, max_size=4, unique=True)):
        rank, kernel = draw(st.integers(1, 9)), draw(st.sampled_from([None, (1, 1), (3, 2)]))
        alpha = draw(st.floats(0.01, 100))
        channels = draw(st.integers(1, 4)) * (kernel[0] * kernel[1] if kernel else 1)
        sites[site] = LoraPair(
            torch.randn(rank, channels, generator=generator).to(dtype),
            torch.randn(draw(st.integers(1, 5)), rank, generator=generator).to(dtype),
            alpha / rank**0.5 if use_rslora else alpha / rank,
            kernel,
        )
    return Adapter(sites, base_model=draw(st.none() | st.just("some/model")))


@settings(deadline=None, max_examples=60)
@given(adapter=adapters())
def test_saving_and_loading_is_the_identity(tmp_path_factory, adapter):
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    save_peft(adapter, folder)
    again = load_peft(folder)
    assert again.identity == adapter.identity
    assert again.base_model == adapter.base_model
    assert peek_peft(folder).num_bytes == adapter.num_bytes


def test_views_of_one_tensor_and_sites_that_share_weights_are_saved(tmp_path):
    shared = torch.randn(4, 6)
    sites = {
        "a.q": LoraPair(shared[:2], shared[:, :2], 1.0),
        "a.v": LoraPair(shared[:2], shared[:, :2], 1.0),
    }
    save_peft(Adapter(sites), tmp_path / "saved")
    assert load_peft(tmp_path / "saved").identity == Adapter(sites).identity
    with safe_open(tmp_path / "saved" / TENSOR_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_unsound_adapter_is_not_saved(tmp_path):
    with pytest.raises(AdapterFormatError, match="NaN"):
        save_peft(
            Adapter({"a.q": LoraPair(torch.full((2, 3), torch.nan), torch.ones(3, 2), 1.0)}),
            tmp_path / "saved",
        )
    assert list(tmp_path.iterdir()) == []


def one_site(value, scaling=1.0):
    return Adapter({"a.q": LoraPair(torch.full((2, 3), value), torch.ones(3, 2), scaling)})


def test_saving_again_replaces_the_adapter_and_keeps_other_files(tmp_path):
    folder = tmp_path / "deep" / "saved"
    save_peft(one_site(1.0), folder)
    (folder / "README.md").write_text("mine")
    save_peft(one_site(2.0, scaling=0.5), folder)
    assert load_peft(folder).identity == one_site(2.0, scaling=0.5).identity
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(tmp_path / "deep") == ["saved"]
    assert (folder / TENSOR_FILE).stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    save_peft(one_site(1.0), folder)

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_peft(one_site(2.0), folder)
    assert load_peft(folder).identity == one_site(1.0).identity
    assert os.listdir(tmp_path) == ["saved"]


def test_what_can_be_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    for name in ("file", "alice.safetensors"):
        with pytest.raises(ConfigError, match=rf"PEFT's format is a folder.*/{name}'.*--format kohya"):
            save_peft(one_site(1.0), tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"mine"


@contextmanager
def refused_because(*reasons):
    """What is done inside may be refused, for one of these reasons."""
    try:
        yield
    except AdapterFormatError as error:
        if not any(reason in str(error) for reason in reasons):
            raise


def test_a_save_that_is_cut_off_between_its_files_leaves_what_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    save_peft(one_site(1.0), folder)
    replace = os.replace

    def cut_off_at_the_config(source, target):
        if target.name == CONFIG_FILE:
            raise OSError("power cut")
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off_at_the_config)
    with pytest.raises(OSError, match="power cut"):
        save_peft(one_site(2.0, scaling=3.0), folder)
    assert "has no adapter_config.json" in refusal(folder)


def test_a_reader_never_pairs_one_adapters_config_with_anothers_weights(tmp_path):
    versions = [one_site(1.0, scaling=1.0), one_site(2.0, scaling=3.0)]
    known = {version.identity for version in versions}
    folder = tmp_path / "saved"
    save_peft(versions[0], folder)
    stop = threading.Event()

    def keep_saving():
        for turn in range(1_000_000):
            if stop.is_set():
                break
            save_peft(versions[turn % 2], folder)

    writer = threading.Thread(target=keep_saving)
    writer.start()
    seen: set[str] = set()
    num_loads = 0
    try:
        deadline = time.monotonic() + 60
        while (len(seen) < 2 or num_loads < 300) and time.monotonic() < deadline:
            num_loads += 1
            with refused_because("changed while it was read", "has no adapter_config.json"):
                seen.add(load_peft(folder).identity)
    finally:
        stop.set()
        writer.join()
    assert seen == known
