"""Prompts to tokens: the two families' prompt formats, and small tokenizers for small models.

Everything goes through the `tokenizers` library, so a small word-level `tokenizer.json` and
a published one are used alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split

from omega_qvla.errors import CheckpointError

if TYPE_CHECKING:
    from omega_qvla.policies.tokenizer_files import TextTokenizer

STATE_BINS = 256
SYSTEM_PROMPT = "You are a helpful assistant."
UNKNOWN = "<unk>"

PI05_SPECIALS = ("<pad>", "<eos>", "<bos>", UNKNOWN)
GROOT_SPECIALS = (
    "<|endoftext|>",
    UNKNOWN,
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
GROOT_PAD, GROOT_IMAGE = "<|endoftext|>", "<IMG_CONTEXT>"

#: A number with its sign, a word, a newline, or one other sign; blanks are dropped.
_PIECE = r"-?\d+|[^\W\d_]+|\n|[^\w\s]|_"


def pi05_prompt(text: str, bins: Sequence[int] | None) -> str:
    """The prompt of pi0.5, after <bos> (openpi models/tokenizer.py).

    Args:
        text: the instruction; underscores and newlines become blanks.
        bins: the discretised state, or None for models that do not read it.
    """
    cleaned = text.strip().replace("_", " ").replace("\n", " ")
    if bins is None:
        return f"{cleaned}\n"
    return f"Task: {cleaned}, State: {' '.join(map(str, bins))};\nAction: "


def state_bins(normalized: np.ndarray) -> np.ndarray:
    """Normalized state [..., d] to bins -1..255 of [-1, 1] (openpi models/tokenizer.py)."""
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    bins: np.ndarray = np.digitize(normalized, bins=edges) - 1
    return bins


def groot_prompt(text: str, num_images: int, tokens_per_image: int) -> str:
    """The chat of GR00T N1.5 with its image placeholders (Eagle 2.5 processor).

    The instruction appears as the string form of a one-element array, `['pick up ...']`: it
    arrives as an array in the original, and its checkpoints are trained on that.
    """
    context = GROOT_IMAGE * tokens_per_image
    images = "".join(f"<image {k + 1}><img>{context}</img>" for k in range(num_images))
    return (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\n{images}{np.array([text])}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def build_pi05_tokenizer(prompts: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer for pi0.5 prompts with these instructions.

    Ids 0..3 are <pad>, <eos>, <bos>, <unk> as in PaliGemma; every state bin is one token.
    """
    numbers = [str(number) for number in range(-1, STATE_BINS)]
    template = pi05_prompt("", [0])
    return _word_level(PI05_SPECIALS, [*_pieces(template), *numbers], prompts)


def build_groot_tokenizer(prompts: Iterable[str]) -> Tokenizer:
    """A word-level tokenizer for GR00T prompts with these instructions; pads with id 0."""
    template = groot_prompt("", 1, 0) + "\"'"
    for special in GROOT_SPECIALS:
        template = template.replace(special, " ")
    digits = [str(digit) for digit in range(10)]
    return _word_level(GROOT_SPECIALS, [*_pieces(template), *digits], prompts)


def _pieces(text: str) -> list[str]:
    return re.findall(_PIECE, text.lower())


def _word_level(
    specials: Sequence[str], template: Iterable[str], prompts: Iterable[str]
) -> Tokenizer:
    words = {piece for prompt in prompts for piece in _pieces(prompt)}
    vocabulary = dict.fromkeys((*specials, *template, *sorted(words)))
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex(_PIECE), behavior="removed", invert=True)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: the tokenizer is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error


def special_id(tokenizer: TextTokenizer | Tokenizer, token: str) -> int:
    """The id of a special token. Raises CheckpointError where the vocabulary lacks it."""
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise CheckpointError(f"the tokenizer has no token {token!r}; it is not this family's")
    return number
