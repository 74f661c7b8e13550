"""Training a lossless byte-level BPE and writing it as the files that `tokenizers` and transformers load."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, END_OF_TURN, PAD = "<|endoftext|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    END_OF_TURN,
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    PAD,
    *(f"<|reserved_{i}|>" for i in range(9)),
)
# Only the model's own turns end with END_OF_TURN: a role token is enough to end the others.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ '<|end|>\\n' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else '' }}"
)
# Contractions; a word with the space before it; one digit; a run of at most three marks; line breaks; other spaces.
# Single digits and short runs of marks keep numbers and JSON punctuation the same tokens wherever they stand.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]{1,3}|\s*[\r\n]+|\s+(?!\S)|\s"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, special tokens first; any text decodes to itself.

    Raises ValueError when the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts fill a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}: "
            "ask for fewer tokens or give more text"
        )
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[int]:
    """How many bytes of text each token id stands for; special tokens stand for none."""
    lengths = [0] * tokenizer.get_vocab_size()
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in SPECIAL_TOKENS else len(token)  # byte-level: one character a byte
    return lengths


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": None,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (END_OF_TEXT, PAD)],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
