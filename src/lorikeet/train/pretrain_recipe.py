"""The recipe of a pretraining run: strict, so that a field that is not known is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from lorikeet.errors import ConfigError
from lorikeet.model.spec import ModelSpec
from lorikeet.train.tokenizer import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS

Positive = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0)]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Llama decoder with tied embeddings."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    context: Positive
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="llama",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_context=self.context,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            tie_embeddings=True,
            eos_ids=(SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(END_OF_TURN)),
        )


class TextSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="text"):
    """A UTF-8 file, plain or gzipped, records separated by U+001E. Paths are relative to the working directory."""

    name: str
    share: Share
    path: str
    about: str = ""


class SyntheticSource(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="synthetic"
):
    """So many characters of the text that the project writes itself, from `seed`; `families` weighs its kinds."""

    name: str
    share: Share
    characters: Positive
    seed: int = 0
    families: dict[str, Share] | None = None
    about: str = ""


class TokenizerPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many characters of each source, by name, the tokenizer is trained on."""

    characters: dict[str, Positive]


class Optimization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Lengths of the schedule in tokens. Rows are `length` tokens until `long_from`, then the whole context."""

    tokens: Positive
    decay_tokens: Positive
    warmup_tokens: int
    length: Positive
    long_from: Positive
    micro_tokens: Positive
    micro_batches: Positive
    muon_lr: float
    adamw_lr: float
    momentum: float = 0.95
    weight_decay: float = 0.0

    @property
    def batch_tokens(self) -> int:
        return self.micro_tokens * self.micro_batches


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pretraining run. `state` holds checkpoints and the token cache, `export` receives the finished model."""

    version: Literal[1]
    name: str
    seed: int
    state: str
    export: str
    model: ModelShape
    tokenizer: TokenizerPlan
    sources: list[TextSource | SyntheticSource]
    optimization: Optimization
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = 2
    compile: Literal["auto", "never"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    log_steps: Positive = 10
    checkpoint_minutes: float = 5.0
    validation_steps: Positive = 200
    validation_rows: Positive = 32

    def state_folder(self) -> Path:
        return Path(self.state).expanduser()


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; ConfigError names the field at fault."""
    try:
        recipe = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Recipe)
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}", param=str(path)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", param=str(path)) from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}", hint="correct or remove the field", param=_field(str(error))) from error
    _check(recipe, path)
    return recipe


def _field(message: str) -> str | None:
    """The field a msgspec message is about."""
    parts = message.split("`")
    return parts[1].removeprefix("$.") if len(parts) > 1 else None


def _check(recipe: Recipe, path: Path) -> None:
    plan, model = recipe.optimization, recipe.model
    names = [source.name for source in recipe.sources]
    rules = [
        (len(set(names)) == len(names), "sources", f"names {names}", "each source once"),
        (
            set(recipe.tokenizer.characters) <= set(names),
            "tokenizer.characters",
            f"{sorted(recipe.tokenizer.characters)}",
            f"names among {names}",
        ),
        (model.heads % model.kv_heads == 0, "model.kv_heads", f"{model.kv_heads}", f"a divisor of {model.heads}"),
        (plan.length <= model.context, "optimization.length", f"{plan.length}", f"at most {model.context}"),
        (
            plan.micro_tokens % model.context == 0 and plan.micro_tokens % plan.length == 0,
            "optimization.micro_tokens",
            f"{plan.micro_tokens}",
            f"a multiple of {plan.length} and {model.context}",
        ),
        (plan.decay_tokens <= plan.tokens, "optimization.decay_tokens", f"{plan.decay_tokens}", f"<= {plan.tokens}"),
    ]
    for holds, field, found, expected in rules:
        if not holds:
            raise ConfigError(
                f"{path}: {field} is {found}, expected {expected}", hint="correct the recipe", param=field
            )
