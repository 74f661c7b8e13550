"""Rows of a recipe -> token sequences with the tokens that count for the loss, exactly as serving will send them.

A prompt is tokenised as the server tokenises the rendered prompt; a completion on its own behind it, so that no merge
runs over the border, and ends with the token that ends generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.config import AdapterRecipe
from lorikeet.data.formats import BrokenRow, Row, Table, read_table
from lorikeet.errors import ConfigError, DataError, InvalidRequestError
from lorikeet.model.tokenizer import Tokenizer
from lorikeet.template import Template


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. The tokens in `learned` (ranges start:stop, start >= 1) count for the loss.

    `line` is the row's line in its file; `prompt` and `completion` are the texts, for the audit.
    """

    line: int
    tokens: list[int]
    learned: tuple[tuple[int, int], ...]
    prompt: str
    completion: str
    ends: bool = True  # every completion ends with a token that ends generation

    @property
    def learned_tokens(self) -> int:
        return sum(stop - start for start, stop in self.learned)

    @property
    def teaches(self) -> bool:
        """Something besides the end of the turn is learned."""
        return bool(self.completion.strip())

    @property
    def inputs(self) -> int:
        """Tokens of a forward pass: the last token is only ever a target."""
        return len(self.tokens) - 1


@dataclass(slots=True)
class ExampleFile:
    """The examples of one file, and its rows that cannot be read or rendered."""

    path: Path
    examples: list[Example] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)
    rows: int = 0


class Renderer:
    """An adapter's template and the base's tokenizer: rows -> examples.

    Raises ConfigError for a template that cannot work with the base (no chat template, no end token, a template that
    does not end its assistant's turns).
    """

    def __init__(self, recipe: AdapterRecipe, tokenizer: Tokenizer) -> None:
        self.name = recipe.name
        self.tokenizer = tokenizer
        if recipe.messages is not None:
            if recipe.messages[-1].role != "assistant":
                raise ConfigError(
                    f"{self.name}.messages: the last message is of role {recipe.messages[-1].role!r}; "
                    "expected assistant, whose text is learned",
                    param=f"{self.name}.messages",
                )
            if tokenizer.chat_template is None:
                raise ConfigError(
                    f"{self.name}.messages: the base has no chat template",
                    hint="write `prompt` and `completion` instead",
                    param=f"{self.name}.messages",
                )
            self.messages = [
                (message.role, Template(message.content, f"{self.name}.messages[{i}]"))
                for i, message in enumerate(recipe.messages)
            ]
            self.prompt = self.completion = None
            self.kind, self.text = "chat", tokenizer.chat_template
        else:
            assert recipe.prompt is not None and recipe.completion is not None
            self.prompt = Template(recipe.prompt, f"{self.name}.prompt")
            self.completion = Template(recipe.completion, f"{self.name}.completion")
            self.messages = []
            self.kind, self.text = "prompt", recipe.prompt
        self.end_id = _end_of(tokenizer, self.name)

    @property
    def columns(self) -> list[str]:
        templates = [t for _, t in self.messages] or [t for t in (self.prompt, self.completion) if t is not None]
        return list(dict.fromkeys(column for template in templates for column in template.columns))

    def read(self, path: Path, convert: str | None = None) -> ExampleFile:
        """Read, render and tokenise a file. A column that no row has is a ConfigError naming those there are."""
        table = read_table(path, convert)
        self._check_columns(table)
        result = ExampleFile(path, broken=list(table.broken), rows=len(table.rows) + len(table.broken))
        rendered: list[tuple[Row, Any]] = []
        for row in table.rows:
            try:
                rendered.append((row, self._render(row)))
            except DataError as error:
                result.broken.append(BrokenRow(row.line, error.message))
        tokenise = self._chat_examples if self.messages else self._prompt_examples
        result.examples.extend(tokenise(rendered))
        result.broken.sort(key=lambda broken: broken.line)
        return result

    def _check_columns(self, table: Table) -> None:
        available = dict.fromkeys(column for row in table.rows for column in row.values)
        for column in self.columns if available else ():
            if column not in available:
                raise ConfigError(
                    f"{self.name}: the template uses column {column!r}, which no row of {table.path} has",
                    hint="columns there: " + ", ".join(map(repr, available)),
                    param=column,
                )

    def _render(self, row: Row) -> Any:
        if self.messages:
            return [{"role": role, "content": template.render(row.values)} for role, template in self.messages]
        assert self.prompt is not None and self.completion is not None
        return self.prompt.render(row.values), self.completion.render(row.values)

    def _prompt_examples(self, rendered: Sequence[tuple[Row, tuple[str, str]]]) -> Iterator[Example]:
        prompts = self.tokenizer.encode_batch([prompt for _, (prompt, _) in rendered])
        completions = self.tokenizer.encode_batch([text for _, (_, text) in rendered], add_special_tokens=False)
        for (row, (prompt, completion)), head, tail in zip(rendered, prompts, completions, strict=True):
            if not head:
                raise ConfigError(
                    f"{self.name}.prompt: line {row.line} renders to no token, and the base begins with none",
                    param=f"{self.name}.prompt",
                )
            tokens = [*head, *tail, self.end_id]
            yield Example(row.line, tokens, ((len(head), len(tokens)),), prompt, completion)

    def _chat_examples(self, rendered: Sequence[tuple[Row, list[dict[str, str]]]]) -> Iterator[Example]:
        for row, messages in rendered:
            yield from self._conversation(row.line, messages)

    def _conversation(self, line: int, messages: list[dict[str, str]]) -> Iterator[Example]:
        """One example for all assistant turns, or one each where the server would tokenise earlier turns otherwise."""
        current: Example | None = None
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, completion = self._turn(line, messages, i)
            head = self.tokenizer.encode(prompt, add_special_tokens=False)
            tail, ends = self._until_end(self.tokenizer.encode(completion, add_special_tokens=False))
            tokens = [*head, *tail]
            learned: tuple[tuple[int, int], ...] = ((len(head), len(tokens)),)
            if current is not None and tokens[: len(current.tokens)] == current.tokens:
                joined = f"{current.completion}\n{message['content']}"
                learned = current.learned + learned
                current = Example(line, tokens, learned, current.prompt, joined, ends and current.ends)
                continue
            if current is not None:
                yield current
            current = Example(line, tokens, learned, prompt, message["content"], ends)
        assert current is not None
        yield current

    def _turn(self, line: int, messages: list[dict[str, str]], i: int) -> tuple[str, str]:
        """The prompt that the server would render before assistant turn i, and what the template adds with the turn."""
        try:
            prompt = self.tokenizer.chat(messages[:i], add_generation_prompt=True)
            whole = self.tokenizer.chat(messages[: i + 1], add_generation_prompt=False)
        except InvalidRequestError as error:
            raise ConfigError(f"{self.name}.messages: line {line}: {error.message}", param="messages") from error
        if not whole.startswith(prompt):
            raise ConfigError(
                f"{self.name}.messages: with this chat template the prompt before an assistant's turn is not the "
                f"beginning of the conversation with it (line {line}), so the learned tokens cannot be told apart",
                hint="write `prompt` and `completion` instead",
                param=f"{self.name}.messages",
            )
        return prompt, whole[len(prompt) :]

    def _until_end(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Up to and with the first token that ends generation: nothing behind it is ever generated."""
        for i, token in enumerate(tokens):
            if token in self.tokenizer.stop_ids:
                return tokens[: i + 1], True
        return tokens, False


def _end_of(tokenizer: Tokenizer, name: str) -> int:
    if tokenizer.eos_id is not None:
        return tokenizer.eos_id
    if tokenizer.stop_ids:
        return tokenizer.stop_ids[0]
    raise ConfigError(
        f"{name}: the base names no end-of-sequence token, so a completion could never end",
        hint="set eos_token_id in the base's config.json",
        param="base",
    )


def length_limit(setting: int | str, lengths: Sequence[int], context: int) -> int:
    """`longest`, a number or a percentile `pNN` of `lengths`, capped by the context; a larger number is refused."""
    if isinstance(setting, int):
        if setting > context:
            raise ConfigError(
                f"max_length: found {setting}; the base's context is {context} tokens", param="max_length"
            )
        return setting
    if not lengths:
        return context
    percent = 100.0 if setting == "longest" else float(setting[1:])
    return min(int(np.percentile(lengths, percent, method="higher")), context)


def truncate_prompt(example: Example, limit: int, keep_first: bool) -> Example | None:
    """The example in `limit` tokens, its prompt cut from the left (behind the begin token where `keep_first`).

    None where the learned part alone does not fit behind one prompt token: a completion is never cut.
    """
    cut = len(example.tokens) - limit
    kept = int(keep_first)
    start = example.learned[0][0]
    if start - cut < kept + 1:
        return None
    tokens = example.tokens[:kept] + example.tokens[kept + cut :]
    return replace(example, tokens=tokens, learned=tuple((a - cut, b - cut) for a, b in example.learned))


def split_validation(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, validation): `share` of the examples, at least one, drawn by `seed`; both keep the file's order."""
    if share <= 0:
        return examples, []
    if share >= 1 or len(examples) < 2:
        raise ConfigError(
            f"data.validation: found {share} of {len(examples)} rows; expected a share below 1 that leaves rows to "
            "train on",
            param="data.validation",
        )
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    held_out = [example for i, example in enumerate(examples) if i in chosen]
    return [example for i, example in enumerate(examples) if i not in chosen], held_out


def digest(*parts: Sequence[Example]) -> str:
    """sha256 over the tokens and learned ranges of examples, in order."""
    state = hashlib.sha256()
    for examples in parts:
        state.update(f"{len(examples)};".encode())
        for example in examples:
            state.update(np.asarray([len(example.tokens), *example.tokens], dtype="<i8").tobytes())
            state.update(repr(example.learned).encode())
    return state.hexdigest()
