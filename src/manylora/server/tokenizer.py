"""A tokenizer, sent from the engine process, which read it with torch at hand, to the API process, which has none."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from manylora.server.messages import TokenizerInfo


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast) -> TokenizerInfo:
    """Return what `build_tokenizer` makes an equal tokenizer of: the same tokens, text and chat template."""
    special = {
        role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    return TokenizerInfo(tokenizer.backend_tokenizer.to_str(), special, tokenizer.chat_template)


def build_tokenizer(info: TokenizerInfo) -> PreTrainedTokenizerFast:
    """Make the tokenizer that `describe_tokenizer` was given."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(info.backend),
        chat_template=info.chat_template,
        clean_up_tokenization_spaces=False,
        **info.special_tokens,
    )
