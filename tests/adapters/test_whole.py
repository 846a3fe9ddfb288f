"""An adapter's folder, whenever the process is killed: the adapter that was there or the new one."""

import itertools
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fused_lora import load_adapter, replace_linear, save_adapter

from .models import adapted, assert_same_layers, net, randomised

pytestmark = pytest.mark.filterwarnings("default")


class Killed(BaseException):
    """Nothing cleans up after it."""


def model_of(r, seed):
    model = net()
    replace_linear(model, r, 5.0, ["up"], freeze=True)
    return randomised(model, seed)


def kill_at(patch, call):
    """Of the renames of a save, and what else it does with its folder, one is never done."""
    left = [call]

    def dying(real):
        def change(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args)

        return change

    for name in ("rename", "replace", "rmdir"):
        patch.setattr(Path, name, dying(getattr(Path, name)))
    return left


def test_killed_between_its_renames(tmp_path, monkeypatch):
    """Another rank and another alpha: half of each would not load, or load with another scale."""
    old, new = model_of(2, 1), model_of(3, 2)
    found = []
    for call in itertools.count():
        folder = tmp_path / str(call)
        save_adapter(old, folder)
        with monkeypatch.context() as patch, suppress(Killed):
            left = kill_at(patch, call)
            save_adapter(new, folder)
        loaded = net()
        load_adapter(loaded, folder)
        found.append(adapted(loaded)["layers.0.up"][0])
        assert_same_layers(loaded, {2: old, 3: new}[found[-1]])
        save_adapter(old, folder)
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        if left[0] >= 0:
            break
    assert found == [2, 3, 3, 3, 3]  # one rename decides; two more, and the removal of a folder, follow


def test_a_full_disk_keeps_the_old_adapter(tmp_path, monkeypatch):
    import safetensors.torch

    old, new = model_of(2, 1), model_of(3, 2)
    save_adapter(old, tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(new, tmp_path)
    loaded = net()
    load_adapter(loaded, tmp_path)
    assert_same_layers(loaded, old)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_config_is_read_where_it_was_decided(tmp_path, monkeypatch):
    """replace_linear reads a folder too."""
    save_adapter(model_of(2, 1), tmp_path)

    def dying(self, target):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(Killed):
            save_adapter(model_of(3, 2), tmp_path)
    model = net()
    replace_linear(model, config=tmp_path)
    assert adapted(model)["layers.0.up"][0] == 3
    load_adapter(model, tmp_path)
    assert torch.equal(model.layers[0].up.lora_A, model_of(3, 2).layers[0].up.lora_A)
