"""Text to token ids and back, from the files of a checkpoint folder.

tokenizer.json is read by the `tokenizers` library directly; transformers is imported only by `Tokenizer.hf`.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.strict_json import read_bytes, read_object
from pyruntime.engine.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate
from pyruntime.errors import CheckpointError, UsageError

MAX_FILE_BYTES: Final = 64 * 2**20
_MAX_CONFIG_BYTES: Final = 8 * 2**20

# bos_token, eos_token and so on, and whatever a model family adds under the same kind of name
_NAMED_SUFFIX: Final = "_token"
_EXTRA_KEYS: Final = ("extra_special_tokens", "additional_special_tokens")
_ADDED_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_TOKEN_ID: Final = re.compile(r"[0-9]{1,9}")
_LOGGER: Final = logging.getLogger("pyruntime")


class Tokenizer:
    """The tokenizer of one checkpoint folder.

    `encode` gives the ids that transformers' tokenizer for tokenizer.json gives. Which special tokens are put around a
    text is decided by the post-processor in tokenizer.json alone; `add_bos_token` and `add_eos_token` of
    tokenizer_config.json are not obeyed (transformers 5 drops them too), and a disagreement is logged once at load.

    Raises CheckpointError when a file is missing, too large or corrupt.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        config = _read_json(self._folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(self._folder / "special_tokens_map.json")
        self._backend = _load_backend(self._folder / "tokenizer.json")
        if self._backend.padding is not None:
            config.setdefault("pad_token", self._backend.padding["pad_token"])
        # a prompt is neither cut nor filled up, whatever the file was saved with
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = config.get("split_special_tokens") is True
        self._named = _add_config_tokens(self._backend, config)
        self._template_text = _find_chat_template(self._folder, config)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(idx for idx, token in added.items() if token.special)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            self._named_id(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        )
        self._warn_about_bos(config.get("add_bos_token"))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises UsageError for text that is no valid Unicode (lone surrogates)."""
        _check_text(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token contribute nothing. Raises UsageError for an id that is negative."""
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise UsageError("TOKEN", f"cannot decode token ids: {error}; expected integers from 0 up") from error
        return text

    def token_to_text(self, token_id: int) -> str:
        """What one token adds to a text that it does not begin, leading space included; "" for an id without a token.

        A token that is part of a character gives U+FFFD.
        """
        # the beginning of a text is treated differently by some decoders, so the token is put behind itself
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]

    def token_piece(self, token_id: int) -> str | None:
        """The token as it stands in the vocabulary, or None for an id without one."""
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id there is, added tokens included; the model's own size may be larger."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """Ids of tokens like <0xE2> that the decoder turns into bytes; empty if it does not."""
        decoder = self._backend.decoder
        if decoder is None or decoder.decode(["<0x41>"]) != "A":
            return frozenset()
        pieces = (template.format(byte) for byte in range(256) for template in ("<0x{:02X}>", "<0x{:02x}>"))
        return frozenset(idx for piece in pieces if (idx := self._backend.token_to_id(piece)) is not None)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises CheckpointError unless the vocabulary, bos and eos are among the model's `vocab_size` ids.

        Added tokens beyond them are noted in the log.
        """
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token_id is not None and token_id >= vocab_size:
                raise CheckpointError(
                    "TOKENIZER",
                    f"{name} {self._named[name]!r} has id {token_id}; the model has ids 0 to {vocab_size - 1}; "
                    "this tokenizer belongs to another model",
                )
        base = max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if base > vocab_size:
            raise CheckpointError(
                "TOKENIZER",
                f"{self._folder.name}: the vocabulary of tokenizer.json has ids up to {base - 1}, the embedding ids 0 "
                f"to {vocab_size - 1}; this tokenizer belongs to another model",
            )
        if self.vocab_size > vocab_size:
            # a token that was added for training, often for padding; a prompt that holds it is refused
            _LOGGER.warning(
                "%s: added tokens have ids up to %d, the embedding has rows for 0 to %d; texts with these tokens are "
                "refused",
                self._folder.name,
                self.vocab_size - 1,
                vocab_size - 1,
            )

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder brings a chat template."""
        return self._template_text is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """`messages` (dicts with "role" and "content") as the text of the model's chat template.

        Raises UsageError when there is no template or no message, when the template refuses the messages, or when it
        runs longer than a second or writes more than 4 MiB.
        """
        if self._template_text is None:
            raise UsageError(
                "CHAT_TEMPLATE",
                "this model has no chat template; use a plain prompt, or put the template of its family into the "
                "folder as chat_template.jinja",
            )
        return self._template.render(messages, add_generation_prompt, self._named)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `render_chat`; the template writes the special tokens itself, so none are added."""
        return self.encode(self.render_chat(messages, add_generation_prompt), add_special_tokens=False)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._template_text or "")

    def hf(self) -> Any:
        """The same tokenizer as a transformers `PreTrainedTokenizerFast`, for libraries that ask for one."""
        return self._hf

    @functools.cached_property
    def _hf(self) -> Any:
        # heavy: a second or more that a run which only encodes and decodes need not pay
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(self._folder), local_files_only=True)

    def _named_id(self, name: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(self._named[name]) if name in self._named else None
        return token_id

    def _warn_about_bos(self, wanted: object) -> None:
        if isinstance(wanted, bool) and self.bos_id is not None and wanted != (self.bos_id in self.encode("")):
            _LOGGER.warning(
                "tokenizer_config.json of %s says add_bos_token=%s but tokenizer.json %s; tokenizer.json is obeyed",
                self._folder.name,
                str(wanted).lower(),
                "adds none" if wanted else "adds one",
            )


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise UsageError("TEXT", f"text is {type(text).__name__}; expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "TEXT", f"text has a lone surrogate U+{ord(text[error.start]):04X} at {error.start}; expected valid Unicode"
        ) from error


def _read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """Content of a text file, None if there is none; never more than the limit is read, whatever its size claims."""
    if not is_there(path):
        return None
    try:
        return read_bytes(path, "TOKENIZER", max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("TOKENIZER", f"{path} is not UTF-8 at byte {error.start}; copy the file again") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, "TOKENIZER", _MAX_CONFIG_BYTES) if is_there(path) else {}


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    text = _read_text(path)
    if text is None:
        raise CheckpointError(
            "TOKENIZER",
            f"{path} is missing; expected the file of a fast tokenizer: save one with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...)), or work with token ids",
        )
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # a panic of the Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise CheckpointError("TOKENIZER", f"{path} is no tokenizer: {error}; copy the file again") from error
    return backend


def _added_token(value: object, where: str) -> tokenizers.AddedToken:
    """A special token from a string, or from an object with flags as tokenizer_config.json writes it."""
    if isinstance(value, str):
        return tokenizers.AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: value[name] for name in _ADDED_FLAGS if isinstance(value.get(name), bool)}
        return tokenizers.AddedToken(value["content"], **flags)
    raise CheckpointError("TOKENIZER", f"{where} is {str(value)[:60]!r}; expected a string or an object with content")


def _add_config_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """Adds the tokens that tokenizer_config.json names to those of tokenizer.json; name -> text of the named ones."""
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(_TOKEN_ID.fullmatch(key) for key in listed):
        raise CheckpointError(
            "TOKENIZER", "tokenizer_config.json: added_tokens_decoder is malformed; expected an object from id to token"
        )
    tokens = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for idx in sorted(listed, key=int):
        token = _added_token(listed[idx], f"added_tokens_decoder[{idx}]")
        tokens[token.content] = token
        backend.add_tokens([token])
        if (found := backend.token_to_id(token.content)) != int(idx):
            _LOGGER.warning(
                "tokenizer_config.json gives the token %r the id %s; by tokenizer.json it is %s, and that is obeyed",
                token.content[:80],
                idx,
                found,
            )
    named, extra = {}, []
    for name, value in config.items():
        if name.endswith(_NAMED_SUFFIX) and isinstance(value, (str, dict)):
            token = _added_token(value, name)
            named[name] = token.content
            extra.append(tokens.get(token.content, token))
    for key in _EXTRA_KEYS:
        values = config.get(key) or []
        if not isinstance(values, (list, dict)):
            raise CheckpointError("TOKENIZER", f"{key} is a {type(values).__name__}; expected a list of tokens")
        for value in values.values() if isinstance(values, dict) else values:
            token = _added_token(value, key)
            extra.append(tokens.get(token.content, token))
    backend.add_special_tokens(extra)
    return named


def _find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    text: object = _read_text(folder / "chat_template.jinja", 4 * MAX_TEMPLATE_CHARS)
    if text is None:
        text = config.get("chat_template")
    if isinstance(text, list):
        text = {item.get("name"): item.get("template") for item in text if isinstance(item, dict)}
    if isinstance(text, dict):
        text = text.get("default")
    if text is not None and (not isinstance(text, str) or len(text) > MAX_TEMPLATE_CHARS):
        raise CheckpointError(
            "CHAT_TEMPLATE", f"chat template of {folder} is no text of at most {MAX_TEMPLATE_CHARS} characters"
        )
    return text
