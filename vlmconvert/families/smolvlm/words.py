"""Numbers in words, which SmolVLM's processor writes with the package num2words."""

from __future__ import annotations

__all__ = ["numbers_in_words"]

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def numbers_in_words() -> None:
    """Let SmolVLM's processor write the number of frames in words without the package num2words, which it asks for."""
    from transformers.models.smolvlm import processing_smolvlm

    if vars(processing_smolvlm)["num2words"] is None:
        vars(processing_smolvlm)["num2words"] = _in_words


def _in_words(number: int) -> str:
    """A number from 0 to 999 in English."""
    hundreds, rest = divmod(number, 100)
    ones = _ONES[rest] if rest < len(_ONES) else _TENS[rest // 10 - 2] + (f"-{_ONES[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return ones
    return f"{_ONES[hundreds]} hundred" + (f" and {ones}" if rest else "")
