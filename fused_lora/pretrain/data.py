"""A text file as tokens: byte-level BPE, memory-mapped files of training and held-out documents, and their batches.

A document is what stands between blank lines, or a piece of it if it is long. Which are held out depends on their text
alone, so that no document is in both parts, however often it comes.
"""

import gzip
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from .. import checks
from ..relora.seeds import mix

END = "<end>"  # of a document: token 0
HELD_OUT_OF = 100  # documents, one is held out
MOST_CHARACTERS = 1 << 14  # of a document: a text whose blank lines are rare is cut up
DOCUMENTS_AT_ONCE = 2048
OPENERS = {".xz": lzma.open, ".gz": gzip.open}


def documents(path: Path) -> Iterator[str]:
    """The documents of a text file, plain or packed (.xz, .gz), without the blank lines; the long ones in pieces."""
    lines: list[str] = []
    length = 0
    with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip() or length + len(line) > MOST_CHARACTERS:
                yield from _pieces(lines)
                lines, length = [], 0
            if line.strip():
                lines.append(line)
                length += len(line)
    yield from _pieces(lines)


def _pieces(lines: list[str]) -> Iterator[str]:
    document = "".join(lines).rstrip("\n")
    return (document[i : i + MOST_CHARACTERS] for i in range(0, len(document), MOST_CHARACTERS))


def is_held_out(document: str) -> bool:
    return zlib.crc32(document.encode()) % HELD_OUT_OF == 0


def train_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text can be written in it and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((d for d in documents(path) if not is_held_out(d)), trainer)
    return tokenizer


class Tokens:
    """A memory-mapped file of tokens, and windows of seq_len + 1 of it."""

    def __init__(self, path: Path, dtype: str):
        self.values = np.memmap(path, dtype=dtype, mode="r")

    def __len__(self) -> int:
        return len(self.values)

    def windows(self, seq_len: int) -> int:
        return max(0, (len(self) - 1) // seq_len)

    def window(self, i: int, seq_len: int) -> Tensor:
        """Tokens i seq_len and the seq_len that follow, int64."""
        return torch.from_numpy(self.values[i * seq_len : (i + 1) * seq_len + 1].astype(np.int64))

    def batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Tensor:
        """(batch_size, seq_len + 1): every window once an epoch, in an order that depends on the seed and the epoch
        alone, so that a resumed run needs the step and no more."""
        count = self.windows(seq_len)
        if count == 0:
            raise ValueError(f"the text has {len(self)} tokens, too few for one window of seq_len={seq_len}")
        places = (divmod(step * batch_size + i, count) for i in range(batch_size))
        return torch.stack([self.window(_order(count, mix(seed, epoch))[i], seq_len) for epoch, i in places])


@lru_cache(maxsize=2)  # a batch can reach into the next epoch
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Data:
    """A tokenizer and the two parts of a text in its tokens."""

    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens

    @property
    def fingerprint(self) -> str:
        """By which a run knows its text again, wherever the folder is."""
        vocabulary = zlib.crc32(self.tokenizer.to_str().encode())
        return f"{len(self.train)} and {len(self.held_out)} tokens of vocabulary {vocabulary:08x}"

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / "about.json").exists()

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> "Data":
        """Raises ValueError for a folder without tokens, with those of another vocabulary, or with half of them."""
        if not cls.exists(folder):
            raise ValueError(f"{folder} holds no tokens: give the text to make them of")
        about = json.loads((folder / "about.json").read_text())
        for part, count in about["tokens"].items():
            size, file = count * np.dtype(about["dtype"]).itemsize, folder / f"{part}.bin"
            if not file.exists() or file.stat().st_size != size:
                raise ValueError(f"{file} is damaged: it should have {size} bytes; remove {folder} to make it anew")
        if about["source"]["vocab"] != vocab_size:
            raise ValueError(f"{folder} holds tokens of a vocabulary of {about['source']['vocab']}, not {vocab_size}")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        parts = (Tokens(folder / f"{part}.bin", about["dtype"]) for part in ("train", "held_out"))
        return cls(tokenizer, *parts)


def prepare(text: Path, folder: Path, vocab_size: int, tokenizer: Path | None = None) -> Data:
    """The text's tokens in `folder`, made there unless they are of this text and vocabulary already.

    By a tokenizer.json with token 0 for the end of a document, or by one that is trained on the text.
    Raises ValueError for a vocabulary below the 257 that bytes and the end need, for a tokenizer with more tokens than
    the vocabulary, and for a text that leaves a part empty; the folder is then as it was.
    """
    checks.check_count("vocab_size", vocab_size, least=257)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # runs that begin together
        return _prepare(text, folder, vocab_size, tokenizer)


def _prepare(text: Path, folder: Path, vocab_size: int, tokenizer: Path | None) -> Data:
    source = {"text": _stamp(text), "tokenizer": tokenizer and _stamp(tokenizer), "vocab": vocab_size}
    about = folder / "about.json"
    if Data.exists(folder) and json.loads(about.read_text())["source"] == source:
        return Data.load(folder, vocab_size)
    encoder = _given(tokenizer) if tokenizer else train_tokenizer(text, vocab_size)
    if encoder.get_vocab_size() > vocab_size:
        raise ValueError(f"{tokenizer} has {encoder.get_vocab_size()} tokens, more than vocab_size={vocab_size}")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    with tempfile.TemporaryDirectory(dir=folder) as new:
        counts = _write_tokens(text, encoder, Path(new), dtype)
        empty = [part for part, count in counts.items() if count == 0]
        if empty:
            raise ValueError(f"{text} has too few documents (blank lines part them): the {empty[0]} part is empty")
        encoder.save(f"{new}/tokenizer.json")
        Path(new, "about.json").write_text(json.dumps({"source": source, "dtype": dtype, "tokens": counts}))
        about.unlink(missing_ok=True)  # it comes last, and says that the others are whole
        for name in ("train.bin", "held_out.bin", "tokenizer.json", "about.json"):
            os.replace(f"{new}/{name}", folder / name)
    return Data.load(folder, vocab_size)


def _given(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # of a type that the library does not export
        raise ValueError(f"{file} is no tokenizer.json: {error}") from None


def _stamp(file: Path) -> list:
    """By which a file is known to be the same."""
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _write_tokens(text: Path, tokenizer: Tokenizer, folder: Path, dtype: str) -> dict[str, int]:
    """Encodes all documents into the files of both parts; how many tokens each has."""
    counts = {"train": 0, "held_out": 0}
    with open(folder / "train.bin", "wb") as train, open(folder / "held_out.bin", "wb") as held_out:
        files = {"train": train, "held_out": held_out}
        for group in _groups(tqdm(documents(text), "tokens", unit=" documents")):
            for document, encoding in zip(group, tokenizer.encode_batch(group), strict=True):
                part = "held_out" if is_held_out(document) else "train"
                values = np.array([*encoding.ids, 0], dtype=dtype)
                files[part].write(values.tobytes())
                counts[part] += len(values)
    return counts


def _groups(items: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == DOCUMENTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group
