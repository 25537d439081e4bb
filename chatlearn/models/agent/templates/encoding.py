"""Text to ids and back: by the Rust half of a tokenizer alone, where that gives the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_PROBE = "two  spaces , it 's . é\n"


class Encoding:
    """``encode`` and ``decode`` of a Hugging Face tokenizer, without its handling of batches.

    Args:
        tokenizer: any; slow ones, and those that do more than their Rust half, are called as usual.
        special: text of special tokens, to compare both ways with.
    """

    def __init__(self, tokenizer: Any, special: str) -> None:
        self._tokenizer = tokenizer
        self._backend = self._find_backend(f"{_PROBE}{special}{_PROBE}")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, special tokens in it as such, none added. [N]"""
        backend = self._backend
        # User code has the same tokenizer, and may have left it truncating.
        if backend is not None and backend.truncation is None and backend.padding is None:
            return backend.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` [N], special tokens included."""
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=False)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _find_backend(self, probe: str) -> Any:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or getattr(self._tokenizer, "split_special_tokens", False):
            return None
        ids = self._tokenizer.encode(probe, add_special_tokens=False)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        is_same = (
            backend.encode(probe, add_special_tokens=False).ids == ids
            and backend.decode(ids, skip_special_tokens=False) == text
        )
        return backend if is_same else None
