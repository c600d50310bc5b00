"""BERT with mean pooling in numpy, and its tokenizer: what the converted model is compared with.

``python -m tests.bert_reference ARCHIVE`` prints what it makes of the original weights: tests/data/minilm_vectors.json.
"""

from __future__ import annotations

import base64
import json
import math
import sys
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
erf = np.vectorize(math.erf)
SENTENCES = (
    "A parked car computes at night.",
    "An electric vehicle runs programs while nobody drives it.",
    "Café naïve — Straße, ÅNGSTRÖM; the résumé of Dvořák!",
    "Bananas are yellow",
    "日本語 and 中文 mixed with English-words_and under_scores 3.14159 $42",
    "it's   spaced\tout\nover lines, isn't it? (yes) [no] {maybe} <tag/> a@b.example #1",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    " ".join(f"number {n} of a long text" for n in range(80)),
)


class Bert:
    """One encoder from the files of its makers."""

    def __init__(self, archive: Path) -> None:
        with zipfile.ZipFile(archive) as folder:
            self.config: dict[str, Any] = json.loads(folder.read("config.json"))
            self.vocab: dict[str, int] = json.loads(folder.read("tokenizer.json"))["model"]["vocab"]
            data = folder.read("model.safetensors")
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        self.weights: dict[str, Array] = {}
        for name, about in header.items():
            if about["dtype"] == "F32":
                begin, end = (8 + size + place for place in about["data_offsets"])
                flat = np.frombuffer(data[begin:end], "<f4").astype(np.float64)
                self.weights[name] = flat.reshape(about["shape"])

    def tokens(self, text: str) -> list[int]:
        """Token ids with the marks at both ends."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self.vocab["[CLS]"], *(self.vocab[piece] for piece in pieces), self.vocab["[SEP]"]]

    def _pieces(self, word: str) -> list[str]:
        out: list[str] = []
        at = 0
        while at < len(word):
            for end in range(len(word), at, -1):
                piece = ("##" if at else "") + word[at:end]
                if piece in self.vocab:
                    out.append(piece)
                    at = end
                    break
            else:
                return ["[UNK]"]
        return out

    def embed(self, ids: list[int]) -> Array:
        """The mean of the last layer, at length 1."""
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = self._norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
        for layer in range(self.config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}."
            mixed = self._linear(at + "attention.output.dense", self._attention(at + "attention.self.", x))
            x = self._norm(at + "attention.output.LayerNorm", mixed + x)
            inner = self._linear(at + "intermediate.dense", x)
            inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
            x = self._norm(at + "output.LayerNorm", self._linear(at + "output.dense", inner) + x)
        mean: Array = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _attention(self, at: str, x: Array) -> Array:
        heads = self.config["num_attention_heads"]
        q, k, v = (
            self._linear(at + part, x).reshape(len(x), heads, -1).swapaxes(0, 1) for part in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out: Array = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        return out.swapaxes(0, 1).reshape(len(x), -1)

    def _linear(self, name: str, x: Array) -> Array:
        out: Array = x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]
        return out

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.config["layer_norm_eps"])
        out: Array = centred / spread * self.weights[name + ".weight"] + self.weights[name + ".bias"]
        return out


def _words(text: str) -> list[str]:
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    spaced = "".join(f" {c} " if _stands_alone(c) else " " if c.isspace() else c for c in plain)
    return spaced.split()


def _stands_alone(c: str) -> bool:
    number = ord(c)
    symbol = 33 <= number <= 47 or 58 <= number <= 64 or 91 <= number <= 96 or 123 <= number <= 126
    return symbol or unicodedata.category(c).startswith("P") or 0x4E00 <= number <= 0x9FFF


def main() -> None:
    model = Bert(Path(sys.argv[1]))
    found = []
    for text in SENTENCES:
        ids = model.tokens(text)
        vector = base64.b64encode(model.embed(ids).astype("<f4").tobytes()).decode()
        found.append({"text": text, "tokens": ids, "vector": vector})
    print(json.dumps(found, ensure_ascii=False, indent=0))  # noqa: T201 - it goes into the file


if __name__ == "__main__":
    main()
