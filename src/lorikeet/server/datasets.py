"""`/api/datasets`: rows to learn from and to judge by, and a look at what a recipe makes of them."""

from __future__ import annotations

import json
import logging
import subprocess
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from lorikeet.config import JobRecipe, job_adapter, read_fields
from lorikeet.data.formats import READERS, Row, read_rows
from lorikeet.engine.lifeline import child_command
from lorikeet.errors import DataError, DeadlineError, InvalidRequestError, LorikeetError, UnsupportedFieldError
from lorikeet.job.preview import Answer, Asked
from lorikeet.registry.home import SPLITS
from lorikeet.registry.records import Actor, Dataset
from lorikeet.registry.references import check_name
from lorikeet.server.auth import Caller, needs
from lorikeet.server.forms import copy_to, fields_of, files_of, is_form, read_form, staged
from lorikeet.server.listing import Query, page_reply, plain
from lorikeet.server.platform import Platform
from lorikeet.server.replies import json_reply
from lorikeet.server.state import ServerState
from lorikeet.server.validation import Body, read_body

log = logging.getLogger("lorikeet.datasets")

Json = dict[str, Any]
MAX_DATASET = 256 * 2**20  # bytes of one upload: rows are checked in memory
FIRST_ROWS = 20  # that a dataset shows
PREVIEW_SECONDS = 60.0
PREVIEW_READ = 2000  # rows of which a preview is made
EXPLODES = 32  # a Parquet file that grows by more when it is read is refused


class RowsBody(Body):
    """A dataset as JSON. `shares`: splits to draw from `rows`, such as {"test": 0.2}."""

    name: str
    description: Annotated[str, Field(max_length=4000)] = ""
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]
    validation: list[dict[str, Any]] | None = None
    test: list[dict[str, Any]] | None = None
    shares: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def routes(state: ServerState, platform: Platform) -> APIRouter:
    router = APIRouter()
    datasets = platform.catalog.datasets

    @router.get("/api/datasets")
    @needs("user")
    async def list_datasets(request: Request, who: Caller) -> Response:
        query = Query(request, "limit", "after", "contains")
        after, contains = query.text("after"), query.text("contains")
        page = await platform.run(datasets.page, who, after=after, limit=query.limit, contains=contains)
        return page_reply(page)

    @router.post("/api/datasets")
    @needs("trainer")
    async def create_dataset(request: Request, who: Caller) -> Response:
        """A form with `file` (or `train`), and `validation` and `test` where there are; or rows as JSON."""
        limit = min(platform.config.max_upload, MAX_DATASET)
        if not is_form(request):
            body = await state.body(request, RowsBody, limit)
            return json_reply(plain(await platform.run_slow(_from_rows, platform, who, body)), 201)
        async with read_form(request, limit) as form:
            fields = fields_of(form, "name", "description", "shares", "seed")
            made = await platform.run_slow(_from_form, platform, who, fields, files_of(form))
        return json_reply(plain(made), 201)

    @router.get("/api/datasets/{name}")
    @needs("user")
    async def get_dataset(who: Caller, name: str) -> Response:
        """With its first rows."""
        found = await platform.run(datasets.get, who, name)
        rows = await platform.run_slow(_first_rows, platform, found, "train", FIRST_ROWS)
        return json_reply(plain(found) | {"first_rows": rows})

    @router.delete("/api/datasets/{name}")
    @needs("trainer")
    async def delete_dataset(who: Caller, name: str) -> Response:
        await platform.run(datasets.delete, who, name)
        return Response(status_code=204)

    @router.post("/api/datasets/{name}/preview")
    @needs("user")
    async def preview(request: Request, who: Caller, name: str) -> Response:
        """What a training would make of the rows: prompts, learned tokens, findings. Nothing is started."""
        raw = await read_body(request, state.config.max_body)
        try:
            fields = json.loads(raw or b"{}")
        except ValueError as error:
            raise InvalidRequestError(f"the body is not valid JSON: {error}", code="malformed_json") from None
        recipe = read_fields(fields, JobRecipe, "recipe")
        found = await platform.run(datasets.get, who, name)
        return json_reply(await platform.run_slow(_preview, platform, found, recipe))

    return router


# --- making one ---------------------------------------------------------------------------------------------------


def _from_form(platform: Platform, who: Actor, fields: dict[str, str], uploads: list[tuple[str, Any]]) -> Dataset:
    name = check_name(fields.get("name", ""))
    shares = _shares(fields.get("shares"))
    seed = fields.get("seed", "0")
    if not (seed.isascii() and seed.isdecimal()):
        raise UnsupportedFieldError(f"'seed': expected a whole number, found {seed[:80]!r}", param="seed")
    with staged(platform.blobs.staging, "dataset-") as place:
        files: dict[str, Path] = {}
        for field, upload in uploads:
            split = "train" if field == "file" else field
            suffix = Path(upload.filename or "").suffix.lower()
            if split not in SPLITS or split in files:
                raise UnsupportedFieldError(
                    f"'{field[:80]}': expected one file for each of file (the rows to train on), validation and test",
                    param=field,
                )  # fmt: skip
            if suffix not in READERS:
                raise UnsupportedFieldError(
                    f"'{field}': files of the kind {suffix or 'without a suffix'} are not read, expected "
                    f"{', '.join(READERS)}", param=field, hint="archives are not unpacked; send the file itself",
                )  # fmt: skip
            files[split] = copy_to(upload, place / f"{split}{suffix}")
            refuse_bomb(files[split], field)
        if "train" not in files:
            raise UnsupportedFieldError("field 'file' is missing", param="file", code="invalid_value")
        return _add(platform, who, name, files, fields.get("description", ""), shares, int(seed))


def _from_rows(platform: Platform, who: Actor, body: RowsBody) -> Dataset:
    with staged(platform.blobs.staging, "dataset-") as place:
        files = {}
        for split, rows in (("train", body.rows), ("validation", body.validation), ("test", body.test)):
            if rows is not None:
                files[split] = place / f"{split}.jsonl"
                files[split].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return _add(platform, who, check_name(body.name), files, body.description, body.shares or {}, body.seed)


def _add(
    platform: Platform, who: Actor, name: str, files: dict[str, Path], description: str, shares: dict[str, float],
    seed: int,
) -> Dataset:  # fmt: skip
    return platform.home.add_dataset(who, name, files, read_rows, shares=shares, seed=seed, description=description)


def _shares(text: str | None) -> dict[str, float]:
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, float])
    except msgspec.DecodeError as error:
        raise UnsupportedFieldError(f"'shares': expected such as {{\"test\": 0.2}}: {error}", param="shares") from None


def refuse_bomb(path: Path, field: str) -> None:
    """A small Parquet file may hold gigabytes: its own sums say so before it is read."""
    if path.suffix != ".parquet":
        return
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        return  # reading it will say what is missing
    try:
        found = parquet.ParquetFile(path).metadata
        size = sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
    except (ArrowException, OSError) as error:
        raise DataError(f"{field}: not a readable Parquet file: {error}", param=field) from None
    if size > max(MAX_DATASET, EXPLODES * path.stat().st_size):
        raise DataError(f"{field}: holds {size} bytes when it is read, expected at most {MAX_DATASET}", param=field)


# --- looking at one -----------------------------------------------------------------------------------------------


def _first_rows(platform: Platform, dataset: Dataset, split: str, count: int) -> list[Json]:
    path = platform.blobs.materialise(dataset.sha256) / dataset.splits[split].file
    rows: list[Json] = []
    for row in READERS[path.suffix](path):
        if len(rows) == count:
            break
        if isinstance(row, Row):
            rows.append(row.values)
    return rows


def _preview(platform: Platform, dataset: Dataset, recipe: JobRecipe) -> Json:
    """Of the first rows; the counts say how many those were. Raises as a training's checks do."""
    with staged(platform.blobs.staging, "preview-") as place:
        splits = {}
        for split in dataset.splits:
            splits[split] = f"{split}.jsonl"
            rows = _first_rows(platform, dataset, split, PREVIEW_READ)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (place / splits[split]).write_text(lines, "utf-8")
        adapter = job_adapter(recipe, "preview", splits)
        asked = Asked(model=platform.model, folder=str(place), splits=splits, recipe=recipe)
        found = _ask(asked)
    all_rows = dataset.splits["train"].rows
    read = min(all_rows, PREVIEW_READ)
    held_out = 0 if "validation" in splits else found["tokens"]["validation_rows"]
    assert adapter.batch_rows is not None and adapter.epochs is not None
    steps = max(1, round(adapter.epochs * -(-(all_rows * (1 - held_out / read)) // adapter.batch_rows)))
    return found | {"rows_read": read, "rows_all": all_rows, "steps": steps}


def _ask(asked: Asked) -> Json:
    command = child_command("lorikeet.job.preview")
    try:
        done = subprocess.run(command, input=msgspec.json.encode(asked), capture_output=True, timeout=PREVIEW_SECONDS)
        answer = msgspec.json.decode(done.stdout, type=Answer)
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"the preview took longer than {PREVIEW_SECONDS:g} s", hint="try again") from None
    except msgspec.DecodeError:
        log.error("a preview broke down: %s", done.stderr.decode("utf-8", "replace")[-2000:])
        raise LorikeetError("the preview broke down; the server's log has the details") from None
    if answer.error is not None:
        raise LorikeetError.from_info(answer.error)
    assert answer.preview is not None
    return answer.preview
