from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omega_qvla.errors import CheckpointError, ObservationError
from omega_qvla.policies.tokenizer import (
    GROOT_SPECIALS,
    PI05_SPECIALS,
    build_groot_tokenizer,
    build_pi05_tokenizer,
    groot_prompt,
    load_tokenizer,
    pi05_prompt,
    state_bins,
)
from policies.tiny import PROMPTS, tiny_groot, tiny_pi05

RECORDED = Path(__file__).parents[1] / "data/conformance/public_groot_prompt_tokens.json"


def test_state_bins_are_the_originals() -> None:
    edges = np.linspace(-1, 1, 257)[:-1]
    values = np.array([-1.5, -1.0, edges[1] - 1e-9, edges[1], 0.0, 0.999, 1.0, 7.0])
    assert state_bins(values).tolist() == [-1, 0, 0, 1, 128, 255, 255, 255]


def test_pi05_prompt_format() -> None:
    assert pi05_prompt(" pick_up\nthe bowl ", [3, -1, 255]) == (
        "Task: pick up the bowl, State: 3 -1 255;\nAction: "
    )
    assert pi05_prompt("pick_up", None) == "pick up\n"


def test_pi05_tokenizer_keeps_bins_and_words_whole() -> None:
    tokenizer = build_pi05_tokenizer(PROMPTS)
    assert [tokenizer.token_to_id(token) for token in PI05_SPECIALS] == [0, 1, 2, 3]
    tokens = tokenizer.encode(
        pi05_prompt("Open the teapot", [0, -1, 255]), add_special_tokens=False
    )
    words = ["task", ":", "open", "the", "<unk>", ",", "state", ":", "0", "-1", "255", ";", "\n"]
    assert tokens.tokens == [*words, "action", ":"]
    ids = {tokenizer.token_to_id(str(number)) for number in range(-1, 256)}
    assert len(ids) == 257
    assert None not in ids
    assert tokenizer.get_vocab_size() <= 512


@pytest.mark.parametrize("case", json.loads(RECORDED.read_text())["cases"][::2])
def test_groot_prompt_is_the_recorded_one(case: dict[str, object]) -> None:
    assert case["form"] == "list_string"
    prompt = groot_prompt(str(case["language"]), 2, 256)
    plain = prompt.replace("<IMG_CONTEXT>", "").replace("<img></img>", "")
    assert plain.replace("<image ", "<image-") == case["templated"]
    # Around the instruction the recorded ids have as many tokens as ours, image by image.
    tokens = build_groot_tokenizer([str(case["language"])]).encode(prompt).tokens
    runs = [count for _, count in case["ids_run_length"]]  # type: ignore[attr-defined]
    assert tokens.count("<IMG_CONTEXT>") == sum(count for count in runs if count > 1) == 512
    lead = ["<|im_start|>", "system", "\n", "you", "are", "a", "helpful", "assistant", "."]
    lead += ["<|im_end|>", "\n", "<|im_start|>", "user", "\n", "<", "image", "1", ">", "<img>"]
    assert tokens[: len(lead)] == lead
    # The published tokenizer has one token more there: the blank in `<image 1>`.
    assert runs.index(256) == len(lead) + 1
    assert tokens[-5:] == ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]


def test_groot_tokenizer_has_single_special_ids() -> None:
    tokenizer = build_groot_tokenizer(PROMPTS)
    assert [tokenizer.token_to_id(s) for s in GROOT_SPECIALS] == list(range(len(GROOT_SPECIALS)))
    assert tokenizer.encode("['open'] <IMG_CONTEXT>").tokens == [
        *["[", "'", "open", "'", "]"],
        "<IMG_CONTEXT>",
    ]
    assert "<unk>" not in tokenizer.encode(groot_prompt(PROMPTS[1], 2, 3)).tokens
    assert tokenizer.get_vocab_size() <= 300


def test_pi05_tokenize_pads_right_and_reads_the_state() -> None:
    processor = tiny_pi05().processor
    low, high = processor.state_norm.low, processor.state_norm.low + processor.state_norm.span
    tokens, mask = processor.tokenize(PROMPTS, np.stack([low, high]))
    assert tokens.shape == mask.shape == (2, processor.model.max_token_len)
    lengths = mask.sum(1).tolist()
    assert lengths[0] < lengths[1]
    for row, length in enumerate(lengths):
        assert mask[row, :length].all()
        assert not mask[row, length:].any()
        assert not tokens[row, length:].any()
        assert tokens[row, 0] == 2
    names = [processor.tokenizer.id_to_token(int(i)) for i in tokens[0, : lengths[0]]]
    assert names.count("0") == 4
    other = [processor.tokenizer.id_to_token(int(i)) for i in tokens[1, : lengths[1]]]
    assert other.count("255") == 4


def test_pi05_prompts_that_do_not_fit_are_refused() -> None:
    processor = tiny_pi05().processor
    with pytest.raises(ObservationError, match="shorten"):
        processor.tokenize(["open " * 40], np.zeros((1, 4)))


def test_groot_tokenize_pads_left() -> None:
    processor = tiny_groot().processor
    tokens, mask = processor.tokenize(PROMPTS)
    alone, whole = processor.tokenize(PROMPTS[:1])
    assert whole.all()
    padding = tokens.shape[1] - alone.shape[1]
    assert padding > 0
    assert not tokens[0, :padding].any()
    assert not mask[0, :padding].any()
    assert (tokens[0, padding:] == alone[0]).all()
    image = processor.model.eagle.image_token_index
    assert int((tokens[1] == image).sum()) == 2 * processor.model.eagle.tokens_per_image


def test_broken_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
