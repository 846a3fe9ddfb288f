"""Text to tokens and back: nothing lost, nothing in both parts, and batches that need the step alone."""

import gzip
import json
import lzma
import random

import pytest
import torch

from fused_lora.pretrain import data

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "naïve", "café", "potions")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 30))) + f" {i}." for i in range(600)]
    path.write_text("\n\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return folder, data.prepare(text, folder, 400)


def decoded(tokens, tokenizer):
    return tokenizer.decode(tokens.values.tolist(), skip_special_tokens=False).split(data.END)[:-1]


def test_every_document_once_in_one_part(text, prepared):
    _, parts = prepared
    train, held_out = (decoded(part, parts.tokenizer) for part in (parts.train, parts.held_out))
    assert sorted(train + held_out) == sorted(data.documents(text))
    assert all(data.is_held_out(document) for document in held_out)
    assert not any(data.is_held_out(document) for document in train)
    assert 0 < len(held_out) < 30


def test_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n one\ntwo  \n \t\nthree\n\n\n")
    assert list(data.documents(path)) == [" one\ntwo  ", "three"]


def test_long_documents_come_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_CHARACTERS", 10)
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\nthree\nfour\n\n0123456789abcdefghijkl\nlast\n")
    assert list(data.documents(path)) == [
        "one\ntwo",
        "three",
        "four",
        "0123456789",
        "abcdefghij",
        "kl",
        "last",
    ]


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_packed_texts(text, suffix, pack, tmp_path):
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack(text.read_bytes()))
    assert list(data.documents(path)) == list(data.documents(text))


def test_any_bytes_come_back(prepared):
    tokenizer = prepared[1].tokenizer
    for string in ("Grüße, 世界! \t\n  x", "\x00\x7f", "🦊" * 3):
        assert tokenizer.decode(tokenizer.encode(string).ids) == string


def test_made_once(text, prepared, monkeypatch):
    folder, parts = prepared
    monkeypatch.setattr(data, "train_tokenizer", lambda *_: pytest.fail("made again"))
    again = data.prepare(text, folder, 400)
    assert (again.train.values == parts.train.values).all()
    monkeypatch.undo()
    about = json.loads((folder / "about.json").read_text())
    other = data.prepare(text, folder, 300)
    assert json.loads((folder / "about.json").read_text())["source"] != about["source"]
    assert other.tokenizer.get_vocab_size() <= 300
    assert sorted(path.name for path in folder.iterdir()) == [
        "about.json",
        "held_out.bin",
        "tokenizer.json",
        "train.bin",
    ]


def test_an_epoch_has_every_window_once(prepared):
    tokens = data.prepare(*_arguments(prepared)).train
    T, batch_size = 16, 7
    count = tokens.windows(T)
    steps = -(-3 * count // batch_size)
    windows = torch.cat([tokens.batch(step, batch_size, T, seed=5) for step in range(steps)])[: 3 * count]
    wanted = torch.stack([tokens.window(i, T) for i in range(count)])
    orders = []
    for epoch in windows.split(count):
        orders.append(epoch)
        assert sorted(epoch.tolist()) == sorted(wanted.tolist())
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(windows[:batch_size], tokens.batch(0, batch_size, T, seed=5))
    assert not torch.equal(windows[:batch_size], tokens.batch(0, batch_size, T, seed=6))
    assert windows.dtype is torch.int64
    assert windows.max() < 400


def _arguments(prepared):
    folder, _ = prepared
    source = json.loads((folder / "about.json").read_text())["source"]
    return data.Path(source["text"][0]), folder, source["vocab"]


def test_windows_follow_one_another(prepared):
    tokens = prepared[1].train
    first, second = tokens.window(0, 10), tokens.window(1, 10)
    assert first.shape == (11,)
    assert first[-1] == second[0]


def test_what_it_refuses(tmp_path, prepared):
    short = tmp_path / "short.txt"
    short.write_text("one document only")
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        data.prepare(short, tmp_path / "tokens", 200)
    with pytest.raises(ValueError, match="too few documents"):
        data.prepare(short, tmp_path / "tokens", 300)
    assert list((tmp_path / "tokens").iterdir()) == []
    with pytest.raises(ValueError, match=r"too few for one window of seq_len=1000000"):
        prepared[1].train.batch(0, 1, 1_000_000, 0)


def test_a_given_tokenizer(text, tmp_path):
    first = data.prepare(text, tmp_path / "first", 400)
    again = data.prepare(text, tmp_path / "again", 400, tmp_path / "first" / "tokenizer.json")
    assert again.train.values.tolist() == first.train.values.tolist()
    with pytest.raises(ValueError, match="has 400 tokens, more than vocab_size=300"):
        data.prepare(text, tmp_path / "few", 300, tmp_path / "first" / "tokenizer.json")
    assert not (tmp_path / "few").exists()


def test_folders_that_hold_no_tokens_or_others(text, tmp_path):
    with pytest.raises(ValueError, match="holds no tokens: give the text"):
        data.Data.load(tmp_path, 400)
    with pytest.raises(ValueError, match="holds tokens of a vocabulary of 400, not 500"):
        data.prepare(text, tmp_path, 400).load(tmp_path, 500)


def test_half_a_file_of_tokens_is_refused(text, tmp_path):
    data.prepare(text, tmp_path, 400)
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train.bin is damaged: it should have \d+ bytes"):
        data.Data.load(tmp_path, 400)


def test_many_short_lines_take_no_time_each(tmp_path):
    """A document's length is kept, not counted anew for every line."""
    path = tmp_path / "lines.txt"
    path.write_text("a\n" * 200_000)
    assert sum(len(document.split("\n")) for document in data.documents(path)) == 200_000
