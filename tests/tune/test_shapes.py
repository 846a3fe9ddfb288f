"""What python -m fused_lora.tune reads: shapes, and models by their configurations."""

import json

import pytest

from fused_lora.tune.shapes import Shape, parse


def test_a_shape():
    assert parse("8192,4096,1024,16", [1, 2], 3) == [Shape(8192, 4096, 1024, 16)]
    assert str(Shape(8192, 4096, 1024, 16)) == "8192,4096,1024,16"


@pytest.mark.parametrize(("text", "words"), [
    ("1,2,3", "shape must be M,K,N,r, got '1,2,3'"),
    ("1,2,3,4,5", "shape must be M,K,N,r"),
    ("8192", "shape must be M,K,N,r, got '8192'"),
    ("0,2,3,4", "M must be at least 1, got 0"),
    ("1,0,3,4", "K must be at least 1"),
    ("1,2,0,4", "N must be at least 1"),
    ("1,2,x,4", "N must be a positive integer, got 'x' in '1,2,x,4'"),
    ("1,-2,3,4", "K must be a positive integer"),
    ("1,2,3,", "r must be a positive integer, got ''"),
    ("1,2,3,0", "r must be between 1 and 512, got 0"),
    ("1,2,3,513", "r must be between 1 and 512"),
])  # fmt: skip
def test_what_is_no_shape_is_said_by_name(text, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        parse(text, [8192], 16)


QWEN = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.filterwarnings("default")  # transformers warns of its own affairs
@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_models_linears_each_size_once_and_no_head(what, tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN))
    shapes = parse(str(tmp_path if what == "folder" else file), [512, 1024], 8)
    sizes = {(64, 128), (64, 64), (128, 64), (64, 96), (96, 64)}  # q; k and v; o; gate and up; down
    assert sorted(shapes) == sorted(Shape(M, K, N, 8) for K, N in sizes for M in (512, 1024))


@pytest.mark.filterwarnings("default")
def test_a_model_that_is_none(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match="nothing"):
        parse("./nothing", [512], 8)
