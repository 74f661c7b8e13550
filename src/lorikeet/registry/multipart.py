"""Uploads to S3 in parts, which go on where they broke off, in whatever process.

fsspec's own `put_file` begins each file again and lets go of the parts that had arrived; single requests are what its
file system of S3 offers beside that (`call_s3`), signed, and repeated where they fail in passing. The store is asked
what it has of a file: nothing about that is kept here. What belongs to a key is what it names by its hash, so parts of
any earlier attempt are parts of this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PART = 16 * 2**20  # bytes; S3 takes 5 MiB and more
MOST_PARTS = 10_000  # of one file, S3's limit
AT_ONCE = 4  # parts


def is_s3(fs: Any) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def upload(fs: Any, path: str, source: Path) -> None:
    """`source` as the object at `path`, from its first part on that is not there yet.

    Raises what `fs` raises: `FileNotFoundError` where there is no such bucket, and where somebody else has just ended
    this upload, whose parts both have put.
    """
    size = source.stat().st_size
    if size <= PART:
        fs.put_file(str(source), path)
        return
    bucket, key, _ = fs.split_path(path)
    target = {"Bucket": bucket, "Key": key}
    target["UploadId"] = _unfinished(fs, bucket, key) or fs.call_s3("create_multipart_upload", **target)["UploadId"]
    step = max(PART, -(-size // MOST_PARTS))
    parts = {number + 1: min(step, size - number * step) for number in range(-(-size // step))}
    tags = {number: tag for number, length, tag in _there(fs, target) if parts.get(number) == length}

    def put(number: int) -> None:
        with source.open("rb") as file:
            file.seek((number - 1) * step)
            body = file.read(parts[number])
        tags[number] = fs.call_s3("upload_part", **target, PartNumber=number, Body=body)["ETag"]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for done in [pool.submit(put, number) for number in parts if number not in tags]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    listed = [{"PartNumber": number, "ETag": tags[number]} for number in parts]
    fs.call_s3("complete_multipart_upload", **target, MultipartUpload={"Parts": listed})


def abandon(fs: Any, root: str, before: float) -> int:
    """Let go of uploads below `root` that were begun before this time (seconds since the epoch); how many."""
    bucket, prefix, _ = fs.split_path(f"{root}/")
    try:
        old = [one for one in _uploads(fs, bucket, prefix) if one["Initiated"].timestamp() < before]
    except PermissionError:
        return 0
    for one in old:
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
    return len(old)


def _unfinished(fs: Any, bucket: str, key: str) -> str | None:
    """The first upload of this key that was not completed. None also where the store does not tell."""
    try:
        return next((str(one["UploadId"]) for one in _uploads(fs, bucket, key) if one["Key"] == key), None)
    except OSError:  # without the right to list, a file begins again, as it would have without this
        return None


def _uploads(fs: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    marker: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        yield from page.get("Uploads") or []
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _there(fs: Any, target: dict[str, str]) -> Iterator[tuple[int, int, str]]:
    """Number, bytes and tag of each part that has arrived."""
    marker: dict[str, int] = {}
    while True:
        page = fs.call_s3("list_parts", **target, **marker)
        for one in page.get("Parts") or []:
            yield int(one["PartNumber"]), int(one["Size"]), str(one["ETag"])
        if not page.get("IsTruncated"):
            return
        marker = {"PartNumberMarker": int(page["NextPartNumberMarker"])}
