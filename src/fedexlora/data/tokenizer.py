"""A model's tokenizer, ready to pad."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedexlora.errors import DataError


def prepare_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the right.

    One without a padding token pads with its end token, or else with its unknown token: padding
    is masked, so which one it is does not matter to the model.

    Args:
        path: a folder, or a model's name on the hub.
        revision: the hub's branch, tag or commit; the default branch if None.

    Raises:
        DataError: if it cannot be loaded, or has no token to pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load the tokenizer of {path!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise DataError(
            f"the tokenizer of {path!r}: expected a padding, end or unknown token, found none"
        )
    # Positions count from the left, and classifiers of GPT-2's kind read the last real token.
    tokenizer.padding_side = "right"
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, and none that the tokenizer would add."""
    # verbose: it would warn of texts longer than the model reads, which are cut afterwards
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
