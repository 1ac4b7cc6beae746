from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.tokenizer import groot_prompt, special_id
from omega_qvla.policies.tokenizer_files import (
    SentencePieceTokenizer,
    read_tokenizer,
    save_tokenizer,
)

DATA = Path(__file__).parents[1] / "data"
EAGLE = DATA / "eagle_tokenizer"
RECORDED = json.loads((DATA / "conformance/public_groot_prompt_tokens.json").read_text())["cases"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: f"{c['form']}-{c['n_tokens']}")
def test_groot_prompt_tokens_are_the_recorded_ones(case: dict[str, object], tmp_path: Path) -> None:
    text = str(case["language"])
    prompt = groot_prompt(text, 2, 256)
    if case["form"] == "plain":
        prompt = prompt.replace(f"['{text}']", text)
    expected = [i for i, count in case["ids_run_length"] for _ in range(count)]  # type: ignore[attr-defined]
    tokenizer = read_tokenizer(EAGLE)
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == expected
    save_tokenizer(tokenizer, tmp_path)
    again = read_tokenizer(tmp_path)
    assert again.encode(prompt, add_special_tokens=False).ids == expected


def test_eagle_special_ids() -> None:
    tokenizer = read_tokenizer(DATA, EAGLE / "vocab.json")
    ids = {"<|endoftext|>": 151643, "<IMG_CONTEXT>": 151669, "<img>": 151670, "</img>": 151671}
    assert {token: special_id(tokenizer, token) for token in ids} == ids


def test_missing_and_broken_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer .*tokenizer\.model"):
        read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="elsewhere: the tokenizer is missing"):
        read_tokenizer(tmp_path, tmp_path / "elsewhere")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing"):
        read_tokenizer(tmp_path)
    for line in ("a b c", "a b"):
        (tmp_path / "merges.txt").write_text(line + "\n")
        with pytest.raises(CheckpointError, match="not byte-level BPE"):
            read_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def model() -> bytes:
    spm = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    text = [
        "Task: open the drawer, State: 12 255 -1;",
        "Action: press the red button 0 3 4 6 7 8 9",
    ]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=out,
        vocab_size=48,
        hard_vocab_limit=False,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return out.getvalue()


def test_sentencepiece(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = read_tokenizer(tmp_path)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<s>", "<unk>")] == [0, 1, 2, 3]
    assert tokenizer.token_to_id("<bos>") is None
    assert tokenizer.id_to_token(tokenizer.get_vocab_size()) is None
    ids = tokenizer.encode("open the drawer", add_special_tokens=False).ids
    assert tokenizer.encode("open the drawer").ids == [2, *ids]
    pieces = "".join(str(tokenizer.id_to_token(i)) for i in ids)
    assert pieces.replace("▁", " ").strip() == "open the drawer"
    save_tokenizer(tokenizer, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").read_bytes() == model
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        read_tokenizer(tmp_path)


def test_sentencepiece_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"omega-qvla\[checkpoints\]"):
        SentencePieceTokenizer(b"")
