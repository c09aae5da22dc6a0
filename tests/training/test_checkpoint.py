import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from manylora.errors import TrainingError
from manylora.training.checkpoint import Checkpoint, load_latest, rng_state, save_checkpoint, set_rng_state


def make_checkpoint(step: int) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    return Checkpoint(
        step=step,
        parameters={"weight": parameter, "strided": torch.randn(4, 3).t()},
        optimizer=optimizer.state_dict(),
        rng=rng_state(),
        fingerprint={"seed": 1, "targets": ["q"]},
        notes={"before": 2.5},
    )


def latest(folder: Path) -> Checkpoint:
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    return checkpoint


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = make_checkpoint(7)
    save_checkpoint(tmp_path, saved, keep=2)
    loaded = latest(tmp_path)
    assert (loaded.step, loaded.fingerprint, loaded.notes) == (7, saved.fingerprint, saved.notes)
    for name, tensor in saved.parameters.items():
        assert torch.equal(loaded.parameters[name], tensor)
    moments = saved.optimizer["state"][0]
    assert moments["exp_avg"].abs().min() > 0
    for name, tensor in moments.items():
        assert torch.equal(loaded.optimizer["state"][0][name], tensor)


def test_random_numbers_go_on_where_they_were(tmp_path):
    save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    expected = torch.rand(5)
    assert not torch.equal(torch.rand(5), expected)
    loaded = latest(tmp_path)
    set_rng_state(loaded.rng)
    assert torch.equal(torch.rand(5), expected)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    assert latest(tmp_path).step == 10


def test_no_checkpoint(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_what_a_kill_left_half_written_does_not_count(tmp_path):
    save_checkpoint(tmp_path, make_checkpoint(1), keep=2)
    (tmp_path / ".step-00000002.aside").mkdir()
    assert latest(tmp_path).step == 1


def write_as_if_on_cuda(path: Path) -> None:
    """Rewrite what torch saved so that its tensors lay on the first CUDA device."""
    with zipfile.ZipFile(path) as file:
        parts = {info: file.read(info) for info in file.infolist()}
    on_cpu, on_cuda = (b"X" + len(at).to_bytes(4, "little") + at for at in (b"cpu", b"cuda:0"))
    with zipfile.ZipFile(path, "w") as file:
        for info, data in parts.items():
            file.writestr(info.filename, data.replace(on_cpu, on_cuda))
    assert on_cuda in b"".join(data.replace(on_cpu, on_cuda) for data in parts.values())


def test_a_checkpoint_of_a_gpu_is_read_where_there_is_none(tmp_path):
    saved = make_checkpoint(3)
    write_as_if_on_cuda(save_checkpoint(tmp_path, saved, keep=1) / "optimizer.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "step-00000003" / "optimizer.pt", weights_only=True)
    moment = latest(tmp_path).optimizer["state"][0]["exp_avg"]
    assert moment.device.type == "cpu"
    assert torch.equal(moment, saved.optimizer["state"][0]["exp_avg"])


class Attack:
    """Unpickling it creates the file that proves that code ran."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return type(self.proof).touch, (self.proof,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda attack, path: path.write_bytes(pickle.dumps(attack, protocol=2))]
)
def test_no_code_in_a_checkpoint_is_run(tmp_path, save):
    proof = tmp_path / "proof"
    folder = save_checkpoint(tmp_path / "run", make_checkpoint(1), keep=1)
    save(Attack(proof), folder / "optimizer.pt")
    with pytest.raises(TrainingError, match="step-00000001 cannot be read"):
        load_latest(tmp_path / "run")
    assert not proof.exists()
    torch.load(folder / "optimizer.pt", weights_only=False) if save is torch.save else pickle.loads(
        (folder / "optimizer.pt").read_bytes()
    )
    assert proof.exists(), "the attack works where it is let"


@pytest.mark.parametrize(
    "file", ["state.json", "parameters.safetensors", "optimizer.pt", "rng.safetensors"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_broken_checkpoint_is_named(tmp_path, file, damage):
    folder = save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TrainingError, match=r"step-00000003 cannot be read.*Delete it"):
        load_latest(tmp_path)
