"""The tokenizer files that checkpoints come with, whatever their format.

Three formats: `tokenizer.json` (the `tokenizers` library), a SentencePiece model (PaliGemma's
`tokenizer.model`, for which `sentencepiece` must be installed) and byte-level BPE tables
(`vocab.json`, `merges.txt`, `added_tokens.json`: Qwen's, which GR00T's Eagle extends).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.files import read_json, write_atomically
from omega_qvla.policies.tokenizer import load_tokenizer

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"

#: Qwen2's split of a text into words before the merges (`Qwen2Tokenizer`, PRETOKENIZE_REGEX).
_QWEN_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Encoded(Protocol):
    """What `TextTokenizer.encode` returns."""

    @property
    def ids(self) -> list[int]: ...


class TextTokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that the processors use."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoded: ...

    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, id: int) -> str | None: ...

    def save(self, path: str) -> None: ...


@dataclass(frozen=True)
class _Ids:
    ids: list[int]


class SentencePieceTokenizer:
    """A SentencePiece model behind the interface of `tokenizers`."""

    def __init__(self, model: bytes, where: str = SENTENCEPIECE_MODEL) -> None:
        """`model`: the serialized protobuf.

        Raises:
            CheckpointError: `sentencepiece` is not installed, or these bytes are no model.
        """
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise CheckpointError(
                f"{where} is a SentencePiece model: install omega-qvla[checkpoints] for "
                "the `sentencepiece` package, or put a tokenizer.json beside it"
            ) from None
        self._model, self._processor = model, SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{where}: not a SentencePiece model: {error}") from error
        if not self._processor.GetPieceSize():
            raise CheckpointError(f"{where}: not a SentencePiece model: it has no pieces")

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> _Ids:
        """Ids of `sequence`, after <bos> if special tokens are asked for."""
        return _Ids(list(self._processor.EncodeAsIds(sequence, add_bos=add_special_tokens)))

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """How many pieces there are."""
        return int(self._processor.GetPieceSize())

    def token_to_id(self, token: str) -> int | None:
        """The id of a piece; None, not the id of <unk>, for what is no piece."""
        number = int(self._processor.PieceToId(token))
        return number if self._processor.IdToPiece(number) == token else None

    def id_to_token(self, id: int) -> str | None:
        """The piece with this id."""
        known = 0 <= id < self.get_vocab_size()
        return str(self._processor.IdToPiece(id)) if known else None

    def save(self, path: str) -> None:
        """Write the model, byte for byte."""
        Path(path).write_bytes(self._model)


def read_tokenizer(folder: Path, given: Path | None = None) -> TextTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: the checkpoint.
        given: a file or a folder to look at instead, because many checkpoints come without.

    Raises:
        CheckpointError: there is none, saying what was looked for; or it is broken.
    """
    if given is not None and not given.exists():
        raise CheckpointError(f"{given}: the tokenizer is missing")
    if given is not None and given.is_file():
        return _reader_of(given)(given)
    places = [given] if given is not None else [folder, folder / "tokenizer"]
    for place in places:
        for name, reader in _READERS.items():
            if (place / name).is_file():
                return reader(place / name)
    raise CheckpointError(
        f"{places[0]} has no tokenizer (none of {', '.join(_READERS)}): put the one that the "
        "checkpoint was trained with there, or name it (`tokenizer=`, --tokenizer)"
    )


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the tokenizer into a checkpoint, atomically, in its own format.

    Raises CheckpointError, OSError.
    """
    spm = isinstance(tokenizer, SentencePieceTokenizer)
    name = SENTENCEPIECE_MODEL if spm else TOKENIZER_JSON
    write_atomically(folder / name, lambda path: _save(tokenizer, path))


def _save(tokenizer: TextTokenizer, path: Path) -> None:
    try:
        tokenizer.save(str(path))
    except OSError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: the tokenizer cannot be written: {error}") from error


def load_json(path: Path) -> TextTokenizer:
    """Read a tokenizer.json. Raises CheckpointError."""
    return cast(TextTokenizer, load_tokenizer(path))


def load_byte_level(path: Path) -> TextTokenizer:
    """Read byte-level BPE tables: a vocab.json with merges.txt and added_tokens.json beside.

    Raises:
        CheckpointError: a table is missing or broken, or they do not fit each other.
    """
    vocabulary: dict[str, Any] = read_json(path)
    merges, added = path.with_name("merges.txt"), path.with_name("added_tokens.json")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [_pair(line) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs))
    except FileNotFoundError:
        raise CheckpointError(f"{merges} is missing: {path.name} is of no use alone") from None
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: not byte-level BPE tables: {error}") from error
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_QWEN_WORD), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    _add_tokens(tokenizer, read_json(added) if added.is_file() else {}, added)
    return cast(TextTokenizer, tokenizer)


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def _add_tokens(tokenizer: Tokenizer, tokens: dict[str, Any], where: Path) -> None:
    """Add special tokens under the ids that the table gives them.

    The library numbers added tokens itself, from the end of the vocabulary on; a table with
    other numbers is put into the vocabulary first, where ids are free to choose.
    """
    if not tokens:
        return
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= tokens
    try:
        extended = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{where}: not added tokens: {error}") from error
    tokenizer.model = extended.model
    names = sorted(tokens, key=lambda token: int(tokens[token]))
    tokenizer.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])


def _load_sentencepiece(path: Path) -> TextTokenizer:
    return SentencePieceTokenizer(path.read_bytes(), str(path))


_READERS: dict[str, Callable[[Path], TextTokenizer]] = {
    TOKENIZER_JSON: load_json,
    SENTENCEPIECE_MODEL: _load_sentencepiece,
    "paligemma_tokenizer.model": _load_sentencepiece,
    "vocab.json": load_byte_level,
}


def _reader_of(path: Path) -> Callable[[Path], TextTokenizer]:
    if path.name in _READERS:
        return _READERS[path.name]
    return _load_sentencepiece if path.suffix == ".model" else load_json
