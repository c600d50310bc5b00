"""Turns a sentence encoder as its makers publish it (BERT, safetensors) into the one file that llama.cpp runs.

The folder, as a zip archive, holds ``config.json``, ``tokenizer.json``, ``model.safetensors`` and
``1_Pooling/config.json``. Matrices become 16-bit floats, as llama.cpp's own converter does it; vectors stay as they
are. Decides: whether the folder is a model that is understood. Must not: fetch anything, or need more than the
standard library: vehicles convert by themselves.

Called by: ``fetch``.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

from motorpool.catalogue import gguf
from motorpool.errors import ModelFileError

WEIGHTS: Final = "model.safetensors"
MAX_HEADER_BYTES: Final = 1 << 20
PIECE_BYTES: Final = 1 << 20
MEAN_POOLING: Final = 1
MOSTLY_F16: Final = 1
_CONTROL, _NORMAL = 3, 1
_SPACE: Final = "\u2581"
# What llama.cpp calls the tensors.
_OUTER: Final = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
_INNER: Final = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_UNUSED: Final = re.compile(r"pooler\..*|embeddings\.position_ids")
_MARKS: Final = {  # of the vocabulary; llama.cpp spells the third one so
    "unknown_token_id": "[UNK]",
    "cls_token_id": "[CLS]",
    "bos_token_id": "[CLS]",
    "eos_token_id": "[SEP]",
    "seperator_token_id": "[SEP]",
    "padding_token_id": "[PAD]",
    "mask_token_id": "[MASK]",
}


def convert(archive: Path, out: Path, *, name: str, licence: str) -> None:
    """Write the GGUF file of the model in ``archive`` to ``out``; raise ModelFileError if it is none that is known."""
    try:
        with zipfile.ZipFile(archive) as folder, folder.open(WEIGHTS) as weights, out.open("wb") as target:
            config = _json(folder, "config.json")
            entries = _entries(config, _json(folder, "1_Pooling/config.json"), name=name, licence=licence)
            entries |= _vocabulary(_json(folder, "tokenizer.json"))
            gguf.write(target, entries, _tensors(weights))
    except (KeyError, TypeError, AttributeError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{archive.name} holds no sentence encoder that can be converted: {error}") from error


def _json(folder: zipfile.ZipFile, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.read(name))
    return found


def _entries(config: dict[str, Any], pooling: dict[str, Any], *, name: str, licence: str) -> dict[str, gguf.Value]:
    if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
        raise ModelFileError("only BERT models with gelu can be converted")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ModelFileError("only BERT models with absolute positions can be converted")
    modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode") and on}
    if modes != {"pooling_mode_mean_tokens"}:
        raise ModelFileError("only models whose vector is the mean over the tokens can be converted")
    return {
        "general.architecture": "bert",
        "general.name": name,
        "general.license": licence,
        "general.file_type": MOSTLY_F16,
        "bert.block_count": int(config["num_hidden_layers"]),
        "bert.context_length": int(config["max_position_embeddings"]),
        "bert.embedding_length": int(config["hidden_size"]),
        "bert.feed_forward_length": int(config["intermediate_size"]),
        "bert.attention.head_count": int(config["num_attention_heads"]),
        "bert.attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "bert.attention.causal": False,
        "bert.pooling_type": MEAN_POOLING,
        "tokenizer.ggml.token_type_count": int(config["type_vocab_size"]),
    }


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, gguf.Value]:
    """WordPiece as llama.cpp has it: what begins a word is marked, and not what goes on in it."""
    model = tokenizer["model"]
    if model.get("type", "WordPiece") != "WordPiece" or not tokenizer["normalizer"]["lowercase"]:
        raise ModelFileError("only vocabularies of word pieces in lower case can be converted")
    numbers: dict[str, int] = model["vocab"]
    words = sorted(numbers, key=numbers.__getitem__)
    if [numbers[word] for word in words] != list(range(len(words))):
        raise ModelFileError("the vocabulary has gaps")
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    entries: dict[str, gguf.Value] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [word if word in special else _piece(word) for word in words],
        "tokenizer.ggml.token_type": [_CONTROL if word in special else _NORMAL for word in words],
    }
    return entries | {f"tokenizer.ggml.{entry}": numbers[word] for entry, word in _MARKS.items()}


def _piece(word: str) -> str:
    return word[2:] if word.startswith("##") else _SPACE + word


def _tensors(weights: IO[bytes]) -> list[gguf.Tensor]:
    """The tensors of a safetensors file under llama.cpp's names, in the order of their bytes."""
    (length,) = struct.unpack("<Q", weights.read(8))
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(f"the header of {WEIGHTS} is over {MAX_HEADER_BYTES} bytes")
    header: dict[str, dict[str, Any]] = json.loads(weights.read(length))
    header.pop("__metadata__", None)
    tensors = []
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if _UNUSED.fullmatch(name):
            continue
        if about["dtype"] != "F32":
            raise ModelFileError(f"{name} is of type {about['dtype']}, not F32")
        begin, end = (8 + length + int(place) for place in about["data_offsets"])
        shape = tuple(int(size) for size in about["shape"])
        kind = gguf.F16 if len(shape) > 1 and "token_type" not in name and "position" not in name else gguf.F32
        data = partial(_bytes, weights, begin, end, halve=kind == gguf.F16)
        tensors.append(gguf.Tensor(name=_renamed(name), shape=shape, kind=kind, data=data))
    return tensors


def _bytes(weights: IO[bytes], begin: int, end: int, *, halve: bool) -> Iterator[bytes]:
    weights.seek(begin)
    left = end - begin
    while left:
        piece = weights.read(min(PIECE_BYTES, left))
        if len(piece) % 4 or not piece:
            raise ModelFileError(f"{WEIGHTS} ends too early")
        left -= len(piece)
        count = len(piece) // 4
        yield struct.pack(f"<{count}e", *struct.unpack(f"<{count}f", piece)) if halve else piece


def _renamed(name: str) -> str:
    found = _LAYER.fullmatch(name)
    if found:
        return f"blk.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    if name in _OUTER:
        return _OUTER[name]
    stem, _, last = name.rpartition(".")
    return f"{_OUTER[stem]}.{last}"
