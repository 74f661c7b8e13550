"""What the SDK's fine-tuning config means as a recipe: every field is translated, or refused by name.

| field | recipe |
|---|---|
| `base_model` | the base that is served; may be left out when a version is continued |
| `task` | `sft` (default): columns prompt and completion, or conversations; `classification`: text and label |
| `adapter` | `lora` |
| `epochs`, `learning_rate`, `rank` | the same |
| `train_steps` | the epochs that make so many optimizer steps, in place of `epochs` |
| `effective_batch_size` | `batch_rows` |
| `lora_alpha`, `lora_dropout`, `warmup_ratio` | `alpha` (left out: twice the rank), `dropout`, `warmup` |
| `target_modules` | `targets` |
| `lr_scheduler` | `schedule`: `cosine`, `linear` or `constant` |
| `optimizer` | AdamW and its `weight_decay` |
| `enable_early_stopping` | `early_stopping` on the rows of split `evaluation` |
| `apply_chat_template` | the prompt is a user's turn in the base's chat template |

What is left out, or null, is as in every recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lorikeet.errors import LorikeetError, UnsupportedFieldError
from lorikeet.registry.records import Dataset
from lorikeet.server.validation import Body, objection, shown, supported

Recipe = dict[str, Any]

TARGETS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down",
}  # fmt: skip
SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
    "linear": "linear",
    "constant_with_warmup": "constant",
    "constant": "constant",
}
OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused")
DEFAULT_RANK, DEFAULT_BATCH_ROWS = 16, 16
PATIENCE = 3  # validations without a better loss

CLASSIFICATION = {"prompt": "{text}\nLabel:", "completion": " {label}"}
COMPLETION = {"prompt": "{prompt}", "completion": "{completion}"}
CHAT = {"messages": [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{completion}"}]}
ROLES = ("system", "user", "assistant")  # columns that a conversation is stored in

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class SchedulerConfig(Body):
    type: str
    params: dict[str, Any] | None = None


class OptimizerConfig(Body):
    type: str
    params: dict[str, Any] | None = None


class FinetuningConfig(Body):
    base_model: str | None = None
    adapter: Annotated[Any, supported("lora")] = None
    task: Literal["sft", "classification"] | None = None
    epochs: Positive | None = None
    train_steps: Count | None = None
    learning_rate: Positive | None = None
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None
    enable_early_stopping: bool | None = None
    apply_chat_template: bool | None = None
    lr_scheduler: SchedulerConfig | None = None
    optimizer: OptimizerConfig | None = None
    lora_alpha: Positive | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    effective_batch_size: Count | None = None


def parse_config(params: dict[str, Any]) -> FinetuningConfig:
    """Raises `UnsupportedFieldError` that names what cannot be done here."""
    try:
        return FinetuningConfig.model_validate(params)
    except ValidationError as error:
        raise objection(FinetuningConfig, error.errors(include_url=False)) from None


def recipe_of(config: FinetuningConfig, dataset: Dataset, *, continued: bool = False) -> Recipe:
    """What a training job is told, in the words of a recipe. Raises `UnsupportedFieldError`.

    `continued`: it goes on from a version, whose shape it has where the config leaves that open.
    """
    recipe: Recipe = _texts(config, dataset)
    rank = config.rank if continued else config.rank or DEFAULT_RANK
    taken = {
        "rank": rank,
        "alpha": config.lora_alpha or (None if rank is None else 2 * rank),
        "epochs": _epochs(config, dataset),
        "learning_rate": config.learning_rate,
        "batch_rows": config.effective_batch_size,
        "dropout": config.lora_dropout,
        "targets": _targets(config),
        "early_stopping": _early_stopping(config, dataset),
        **_schedule(config),
        **_optimizer(config),
    }
    return recipe | {name: value for name, value in taken.items() if value is not None}


def _texts(config: FinetuningConfig, dataset: Dataset) -> Recipe:
    """Prompt and completion, or messages, by the task and the columns that are there."""
    columns = set(dataset.columns)
    if config.task == "classification":
        if config.apply_chat_template:
            raise _refused("apply_chat_template", "is for task 'sft'", True)
        _need(dataset, "classification", ("text", "label"))
        return dict(CLASSIFICATION)
    if "prompt" not in columns and {"user", "assistant"} <= columns:
        if config.apply_chat_template is False:
            raise _refused("apply_chat_template", f"{dataset.name!r} holds conversations, which need it", False)
        return {"messages": [{"role": role, "content": f"{{{role}}}"} for role in ROLES if role in columns]}
    _need(dataset, "sft", ("prompt", "completion"))
    return dict(CHAT if config.apply_chat_template else COMPLETION)


def _need(dataset: Dataset, task: str, columns: tuple[str, ...]) -> None:
    if not set(columns) <= set(dataset.columns):
        raise UnsupportedFieldError(
            f"task {task!r} needs the columns {' and '.join(columns)}; dataset {dataset.name!r} has "
            + ", ".join(map(repr, dataset.columns)),
            param="dataset",
            code="invalid_value",
        )


def _epochs(config: FinetuningConfig, dataset: Dataset) -> float | None:
    if config.train_steps is None:
        return config.epochs
    rows = dataset.splits["train"].rows
    steps_per_epoch = -(-rows // (config.effective_batch_size or DEFAULT_BATCH_ROWS))
    return (config.train_steps - 0.5) / steps_per_epoch  # rounded up to whole steps by whoever trains


def _targets(config: FinetuningConfig) -> list[str] | None:
    if config.target_modules is None:
        return None
    for i, module in enumerate(config.target_modules):
        if module not in TARGETS:
            raise _refused(f"target_modules.{i}", "expected " + ", ".join(TARGETS), module)
    return list(dict.fromkeys(TARGETS[module] for module in config.target_modules))


def _early_stopping(config: FinetuningConfig, dataset: Dataset) -> Recipe | None:
    if not config.enable_early_stopping:
        return None
    if "validation" not in dataset.splits:
        raise _refused(
            "enable_early_stopping", f"dataset {dataset.name!r} has no rows whose column split is 'evaluation'", True
        )
    return {"metric": "loss", "patience": PATIENCE}


def _schedule(config: FinetuningConfig) -> Recipe:
    """`schedule` and `warmup`. Without warm-up `constant` is what the protocol means by it."""
    warmup = config.warmup_ratio
    if config.lr_scheduler is None:
        return {"warmup": warmup}
    kind, params = config.lr_scheduler.type, dict(config.lr_scheduler.params or {})
    if kind not in SCHEDULES:
        raise _refused("lr_scheduler.type", "expected " + ", ".join(SCHEDULES), kind)
    if kind == "cosine_with_restarts" and params.pop("num_cycles", 1) not in (1, None):
        cycles = (config.lr_scheduler.params or {})["num_cycles"]
        raise _refused("lr_scheduler.params.num_cycles", "expected 1, restarts are not supported", cycles)
    _no_more("lr_scheduler.params", params)
    if kind == "constant":
        if warmup:
            raise _refused("warmup_ratio", "expected 0 with 'constant'; there is 'constant_with_warmup'", warmup)
        warmup = 0.0
    return {"schedule": SCHEDULES[kind], "warmup": warmup}


def _optimizer(config: FinetuningConfig) -> Recipe:
    if config.optimizer is None:
        return {}
    if config.optimizer.type not in OPTIMIZERS:
        raise _refused("optimizer.type", "expected " + ", ".join(OPTIMIZERS), config.optimizer.type)
    params = dict(config.optimizer.params or {})
    decay = params.pop("weight_decay", None)
    if decay is not None and (isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < 1e3):
        raise _refused("optimizer.params.weight_decay", "expected a number from 0 on", decay)
    _no_more("optimizer.params", params)
    return {"weight_decay": decay}


def _no_more(where: str, params: dict[str, Any]) -> None:
    for name, value in params.items():
        if value is not None:
            raise _refused(f"{where}.{name}", "is not supported; leave it out", value)


def _refused(field: str, said: str, found: object) -> LorikeetError:
    return UnsupportedFieldError(f"'{field}': {said}, found {shown(found)}", param=field, code="invalid_value")
