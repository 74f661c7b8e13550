"""Recipes and settings: frozen, keyword-only, composed. Environment variables only for secrets and paths.

Recipes are read strictly: an unknown field, a wrong type or an impossible value is a `ConfigError` that names the
field by its path, what was found and what is expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from lorikeet.errors import ConfigError

Positive = Annotated[int, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
AdapterName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]

AnyRecipe = TypeVar("AnyRecipe", bound=msgspec.Struct)

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every recipe part."""


# --- training -----------------------------------------------------------------------------------------------------


class EarlyStopping(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    metric: Literal["loss"] = "loss"
    patience: Positive = 3


class TrainData(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`validation` is a path, or the share of the training rows held out by the adapter's seed."""

    train: str
    test: str | None = None  # read by the audit alone: duplicates across train and test
    validation: str | float = 0.0
    convert: Literal["bio"] | None = None  # `tokens` and BIO `tags` -> `text` and `entities`


class Message(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant"]
    content: str


class AdapterSettings(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `defaults` may set and each adapter may override; None is "as in defaults"."""

    epochs: Annotated[float, Meta(gt=0)] | None = None
    seed: int | None = None
    rank: Positive | None = None
    alpha: Annotated[float, Meta(gt=0)] | None = None
    rslora: bool | None = None
    targets: Literal["all-linear"] | list[Literal["q", "k", "v", "o", "gate", "up", "down"]] | None = None
    kind: Literal["lora"] | None = None
    learning_rate: Annotated[float, Meta(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant"] | None = None
    warmup: Fraction | None = None  # share of the adapter's optimizer steps
    batch_rows: Positive | None = None  # rows of one optimizer step
    weight_decay: NonNegative | None = None
    clip: NonNegative | None = None  # 0 is off
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] | None = None
    max_length: int | str | None = None  # "longest", a number, or a percentile such as "p95"
    too_long: Literal["error", "drop", "truncate_prompt"] | None = None
    unteachable: Literal["error", "drop"] | None = None  # rows with no token to learn from
    early_stopping: EarlyStopping | None = None


DEFAULTS = AdapterSettings(
    epochs=3,
    seed=0,
    rank=16,
    alpha=32,
    rslora=False,
    targets="all-linear",
    kind="lora",
    learning_rate=5e-4,
    schedule="cosine",
    warmup=0.03,
    batch_rows=16,
    weight_decay=0.0,
    clip=1.0,
    dropout=0.0,
    max_length="longest",
    too_long="error",
    unteachable="error",
)


class AdapterRecipe(AdapterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter: its data, and a prompt with a completion, or chat messages."""

    name: AdapterName
    data: TrainData
    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None


# --- judging ------------------------------------------------------------------------------------------------------


class EvalData(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    test: str
    train: str | None = None  # for the baseline, and for `choices: from-data` when the test labels do not cover all
    limit: Positive | None = None  # a sample of N items, drawn by the recipe's seed
    group_by: str | None = None  # rows equal in this column are one item with several references
    convert: Literal["bio"] | None = None  # `tokens` and BIO `tags` -> `text` and `entities`


class EvalTask(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task whose adapter is trained by the same recipe may leave out `prompt`, `messages` and `reference`."""

    name: str
    data: EvalData
    metric: str  # accuracy | macro_f1 | rouge_l | json_exact | json_field_f1 | regex | python:module.function
    reference: str | list[str] | None = None
    adapter: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    choices: Literal["from-data"] | list[str] | None = None
    max_tokens: Positive = 16
    stop: list[str] = []
    baseline: Literal["tfidf"] | None = None
    input: str | None = None  # the column the baseline reads; default: the prompt as rendered


# --- jobs ---------------------------------------------------------------------------------------------------------


class JudgeRecipe(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an adapter and its base are judged on a split of a dataset; prompt and reference default to the adapter's."""

    # None: accuracy among the labels where answers repeat, json_exact where they are JSON, else rouge_l
    metric: Literal["accuracy", "macro_f1", "rouge_l", "json_exact", "json_field_f1", "regex"] | None = None
    split: Literal["test", "validation", "train"] = "test"
    prompt: str | None = None
    messages: list[Message] | None = None
    reference: str | list[str] | None = None
    choices: Literal["from-data"] | list[str] | None = None
    max_tokens: Positive = 64
    stop: list[str] = []
    limit: Positive | None = 500  # items, drawn by the seed
    group_by: str | None = None
    baseline: Literal["tfidf"] | None = None
    input: str | None = None
    seed: int = 0


class JobRecipe(AdapterSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a training job does with a dataset of the catalog: an adapter's recipe without its name and its files."""

    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None
    convert: Literal["bio"] | None = None
    validation: Annotated[float, Meta(ge=0.0, lt=1.0)] | None = None  # share, where the dataset has no such split
    checkpoints: Annotated[int, Meta(ge=0, le=100)] = 10  # at most so many, at the ends of epochs
    evaluate: JudgeRecipe | bool = True  # judge base and adapter afterwards, where the dataset has a test split


def job_adapter(recipe: JobRecipe, name: str, splits: Mapping[str, str]) -> AdapterRecipe:
    """The resolved recipe of a job's adapter; `splits` maps splits to file names. Raises `ConfigError`."""
    validation: str | float = splits.get("validation") or recipe.validation or 0.0
    if "validation" in splits and recipe.validation:
        raise ConfigError(
            f"validation: found {recipe.validation:g}, and the dataset has a validation split of its own",
            hint="leave it out", param="validation",
        )  # fmt: skip
    data = TrainData(train=splits["train"], test=splits.get("test"), validation=validation, convert=recipe.convert)
    settings = {field: getattr(recipe, field) for field in AdapterSettings.__struct_fields__}
    adapter = AdapterRecipe(
        name=name, data=data, prompt=recipe.prompt, completion=recipe.completion, messages=recipe.messages, **settings
    )
    return _resolve(adapter, AdapterSettings(), "recipe")


def read_fields(raw: Any, kind: type[AnyRecipe], where: str) -> AnyRecipe:
    """A part of a request as a recipe. Raises `ConfigError` that names field, found and expected."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message = _with_found(str(error), raw).replace("`$", f"`{where}")
        raise ConfigError(f"{where}: {message}", hint=_fields_hint(str(error), kind), param=where) from None


# --- a recipe file ------------------------------------------------------------------------------------------------


class Recipe(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file for both commands: `lorikeet train` reads the adapters, `lorikeet eval` the tasks."""

    version: Literal[1]
    base: str | None = None
    output: str | None = None  # the folder of the adapters: written by train, read by an offline eval
    defaults: AdapterSettings = AdapterSettings()
    adapters: list[AdapterRecipe] = []
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    step_tokens: Positive = 8192  # tokens of one shared forward pass; more is accumulated, with the same result
    tasks: list[EvalTask] = []
    results: str | None = None  # file that eval writes
    seed: int = 0  # of eval: the order of the load, samples of items, bootstrap
    bootstrap: Positive = 2000


class TrainRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as `lorikeet train` needs it."""

    base: str
    output: str
    adapters: Annotated[list[AdapterRecipe], Meta(min_length=1)]


class EvalRecipe(Recipe, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe as `lorikeet eval` needs it."""

    tasks: Annotated[list[EvalTask], Meta(min_length=1)]


def resolve_adapters(recipe: TrainRecipe) -> list[AdapterRecipe]:
    """The adapters with every setting filled in: their own, else the recipe's defaults, else `DEFAULTS`."""
    names = [adapter.name for adapter in recipe.adapters]
    resolved = []
    for i, adapter in enumerate(recipe.adapters):
        where = f"$.adapters[{i}]"
        if names.index(adapter.name) != i:
            raise ConfigError(f"{where}.name: {adapter.name!r} is used twice; names must differ", param=f"{where}.name")
        resolved.append(_resolve(adapter, recipe.defaults, where))
    return resolved


def _resolve(adapter: AdapterRecipe, defaults: AdapterSettings, where: str) -> AdapterRecipe:
    if (adapter.messages is None) == (adapter.prompt is None):
        raise ConfigError(
            f"{where}: expected either `prompt` with `completion`, or `messages`, found "
            + ("both" if adapter.messages is not None else "neither"),
            param=where,
        )
    if adapter.prompt is not None and adapter.completion is None:
        raise ConfigError(f"{where}.completion: missing beside `prompt`", param=f"{where}.completion")
    settings: dict[str, Any] = {}
    for field in AdapterSettings.__struct_fields__:
        own, shared = getattr(adapter, field), getattr(defaults, field)
        settings[field] = own if own is not None else shared if shared is not None else getattr(DEFAULTS, field)
    _check_max_length(settings["max_length"], f"{where}.max_length")
    return msgspec.structs.replace(adapter, **settings)


def _check_max_length(value: int | str, where: str) -> None:
    if isinstance(value, int):
        fine = value >= 2
    else:
        match = re.fullmatch(r"p(\d+(?:\.\d+)?)", value)
        fine = value == "longest" or (match is not None and 0 < float(match[1]) <= 100)
    if not fine:
        raise ConfigError(f"{where}: found {value!r}; expected 'longest', a number of tokens, or 'p95'", param=where)


def resolve_tasks(recipe: EvalRecipe) -> list[EvalTask]:
    """The tasks with prompt and reference filled in from the adapter of the same recipe where they are left out."""
    trained = {adapter.name: adapter for adapter in recipe.adapters}
    resolved = []
    for i, task in enumerate(recipe.tasks):
        where = f"$.tasks[{i}]"
        if any(other.name == task.name for other in recipe.tasks[:i]):
            raise ConfigError(f"{where}.name: {task.name!r} is used twice; names must differ", param=f"{where}.name")
        if task.prompt is not None and task.messages is not None:
            raise ConfigError(f"{where}: expected one of `prompt` and `messages`, found both", param=where)
        adapter = trained.get(task.adapter or "")
        if task.prompt is None and task.messages is None:
            if adapter is None:
                raise ConfigError(f"{where}.prompt: missing, and no adapter of this recipe gives it", param=where)
            question = adapter.messages[:-1] if adapter.messages is not None else None
            task = msgspec.structs.replace(task, prompt=adapter.prompt, messages=question)
        if task.reference is None:
            if adapter is None:
                raise ConfigError(f"{where}.reference: missing, and no adapter of this recipe gives it", param=where)
            answer = adapter.messages[-1].content if adapter.messages is not None else adapter.completion
            task = msgspec.structs.replace(task, reference=answer)
        resolved.append(task)
    return resolved


Named = TypeVar("Named", AdapterRecipe, EvalTask)


def chosen(items: Sequence[Named], only: Collection[str]) -> list[Named]:
    """The adapters or tasks of these names, in the recipe's order; all of them when no name is given."""
    names = [item.name for item in items]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: found {name!r}; the recipe has {', '.join(names)}", param="only")
    return [item for item in items if not only or item.name in only]


# --- serving ------------------------------------------------------------------------------------------------------


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine process needs. Sizes in bytes; None is "chosen from the machine"."""

    model: str = "lorikeet-nano"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 only where the device has it natively
    # Of the linear layers of the base, int8 on a CPU also of its head. Weights only, products stay bf16; fp8: inputs as
    # well. nf4 and fp8: on a GPU
    quantize: Literal["none", "int8", "int4", "nf4", "fp8"] = "none"
    tensor_parallel: int = 1  # GPUs that hold the base together: 1, 2, 4 or 8; memory is of each of them
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: as dtype
    adapter_memory: int | None = None
    adapter_host_memory: int | None = None  # pinned, behind a GPU; refused on a CPU: there is no second tier of memory
    adapter_disk: int | None = None
    kv_memory: int | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"  # auto: as dtype; fp8, on a GPU: two tokens for one in bf16
    block_size: int = 16
    max_seqs: int = 64
    max_context: int | None = None  # None: the model's
    step_tokens: int = 1024
    chunk_tokens: int | None = None  # of prompts, in a step beside running streams; None: so that their gaps stay even
    queue: int = 1024
    tenant_queue: int | None = None  # requests of one tenant that may wait; None: as many as `queue` holds
    tenant_weights: dict[str, float] = {}  # shares of tenants under contention, 1 where not named
    fair: bool = True  # tenants, and adapters, take turns; else requests are taken as they come
    prefix_cache: bool = True
    allow_lock_mismatch: bool = False
    threads: int | None = None


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How adapters are fetched from elsewhere. Sizes in bytes, times in seconds."""

    allow_private: bool = False  # addresses that are not public, and http
    use_proxy: bool = False  # the hub and https through $HTTPS_PROXY, but for the hosts of $NO_PROXY
    s3_endpoint: str | None = None  # of an S3-compatible store; None: AWS
    max_bytes: int = 4 * 2**30  # of one adapter
    cache_bytes: int = 20 * 2**30  # of all downloads; the longest unused go first
    stall_seconds: float = 10.0  # without a byte, and an attempt has failed
    attempt_seconds: float = 60.0
    total_seconds: float = 120.0  # what a request waits, and a download may take
    attempts: int = 5  # in a row without progress
    backoff_seconds: float = 0.5  # before the second attempt, doubled before each further one
    longest_backoff: float = 10.0


class PlatformConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`lorikeet up`: what there is beside serving, below one home folder. Sizes in bytes, times in seconds."""

    home: str
    catalog: str | None = None  # URL of a PostgreSQL database; None: a SQLite file in the home folder
    blobs: str | None = None  # URL of an object store; None: a folder in the home folder
    job_concurrency: int = 1  # job processes at once; a joint run is one
    job_memory: int | None = None  # of all job processes together; None: half of the machine's
    job_threads: int | None = None  # CPU threads of each; None: all cores, at a low priority
    join: int = 8  # jobs of one joint run at most; 1: none are joined
    max_upload: int = 2 * 2**30  # of one request, all its files together
    folders: int = 20 * 2**30  # of adapters and datasets that lie ready as folders


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`lorikeet serve`: the engine and the HTTP process in front of it; with `platform`, `lorikeet up`."""

    engine: EngineConfig = EngineConfig()
    adapters: str | None = None
    adapter_sources: tuple[Literal["hf", "s3", "gs", "az", "https"], ...] = ()  # from where requests may name adapters
    sources: SourceConfig = SourceConfig()
    host: str = "127.0.0.1"
    port: int = 8000
    drain_seconds: float = 30.0
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()  # pages from elsewhere that may use the server, such as https://app.example.com
    allowed_hosts: tuple[str, ...] = ()  # names by which a server that needs no key may be reached, beside its own
    max_body: int = 16 * 2**20
    served_name: str | None = None  # the base's name in `model`; default: its own
    platform: PlatformConfig | None = None


# --- reading ------------------------------------------------------------------------------------------------------


def read_recipe(path: Path, kind: type[AnyRecipe]) -> AnyRecipe:
    """Read a YAML recipe strictly. Raises `ConfigError` naming file, field, found and expected."""
    import yaml

    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist", param="recipe") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", param="recipe") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(raw).__name__}", param="recipe")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        message = _with_found(str(error), raw)
        raise ConfigError(f"{path}: {message}", hint=_fields_hint(str(error), kind), param="recipe") from None


def load_yaml(text: str) -> Any:
    """One YAML document, with the numbers of YAML 1.2: 1e-3 is one, too. Raises `yaml.YAMLError`."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)


def _with_found(message: str, raw: Any) -> str:
    """A message that ends with a path, such as "Expected `int` >= 1 - at `$.rank`", with the value that is there."""
    _, mark, path = message.rpartition(" - at `$")
    if not mark or "[...]" in path or not message.startswith("Expected"):
        return message
    found = raw
    try:
        for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            found = found[name or int(index)]
    except (LookupError, TypeError):
        return message
    shown = repr(found)
    return f"{message}, found {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _fields_hint(message: str, kind: type[msgspec.Struct]) -> str | None:
    """Known fields, when the message is about an unknown one at the top level."""
    if "unknown field" in message and " - at `$" not in message:
        return "known fields: " + ", ".join(kind.__struct_fields__)
    return None


def parse_size(text: str | int, param: str = "size") -> int:
    """`2GiB`, `512MiB`, `1e9`, `1000000` -> bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{param}: found {text!r}; expected bytes or a size such as 512MiB or 2GiB", param=param)
    size = float(match[1]) * _UNITS[match[2]]
    if not math.isfinite(size) or size < 1:
        raise ConfigError(f"{param}: found {text!r}; expected a size above zero", param=param)
    return int(size)
