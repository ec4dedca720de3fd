"""`shoal check`: verifies a bucket offline, or tells its garbage."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from shoal_cluster.bucket.open import open_store
from shoal_cluster.cli.failure import EXIT_PROBLEMS
from shoal_cluster.cli.output import Table
from shoal_cluster.cli.session import Session, shoal_command
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import NotFound

if TYPE_CHECKING:
    from shoal_cluster.shard.checking import CheckReport
    from shoal_cluster.shard.garbage_survey import ShardGarbage


@click.command()
@click.argument("place", metavar="BUCKET")
@click.option("--fast", is_flag=True, help="Checksums and invariants only; rows are not decoded.")
@click.option("--garbage", is_flag=True, help="List what is garbage, and what was deleted and why.")
@shoal_command
def check(session: Session, place: str, fast: bool, garbage: bool) -> None:
    """Verifies every checksum and invariant in BUCKET (a directory or URL), without a cluster.

    Exit status 3 when there are problems; each is named with the object that has it. Reads only.

    With --garbage it verifies nothing and lists which objects garbage collection would delete now,
    and those it has deleted, each with the manifest that justifies it.
    """
    _require_directory(place)
    if garbage:
        _tell_garbage(session, place)
        return
    with session.output.progress("objects") as progress:
        report = asyncio.run(_check(place, deep=not fast, progress=progress))
    found = len(report.problems)
    session.output.result(
        {"bucket": place, "deep": not fast, **asdict(report)},
        *_tables(report),
        f"{found} problem{'' if found == 1 else 's'} in {report.objects:,} objects "
        f"({report.bytes / 2**20:,.1f} MiB): {report.collections:,} collections, "
        f"{report.shards:,} shards, {report.rows:,} rows",
    )
    if found:
        click.get_current_context().exit(EXIT_PROBLEMS)


async def _check(
    bucket: str, *, deep: bool, progress: Callable[[int, int | None], None]
) -> "CheckReport":
    # Imported here: it brings in FAISS, half a second that `shoal status` need not pay.
    from shoal_cluster.shard.checking import check_bucket

    store = open_store(bucket)
    try:
        return await check_bucket(store, deep=deep, progress=progress)
    finally:
        await store.close()


def _tell_garbage(session: Session, place: str) -> None:
    shards = asyncio.run(_survey(place))
    due = [
        (objects, shard.due.epoch, shard.due.manifest_version, reason)
        for shard in shards
        if shard.due is not None
        for objects, reason in shard.due.lines(shard.keys)
    ]
    deleted = [
        (_time(round_.wall_ms), objects, round_.epoch, round_.manifest_version, reason)
        for shard in shards
        for round_ in shard.deleted
        for objects, reason in round_.lines(shard.keys)
    ]
    kept = [key for shard in shards for key in shard.unreadable]
    columns = ("objects", "epoch", "manifest", "why")
    session.output.result(
        {
            "bucket": place,
            "due": [dict(zip(columns, row, strict=True)) for row in due],
            "deleted": [dict(zip(("at", *columns), row, strict=True)) for row in deleted],
            "unreadable": kept,
        },
        Table(title="Garbage", columns=columns, rows=due),
        Table(title="Deleted", columns=("at", *columns), rows=deleted),
        *(f"{key} cannot be read, so it is kept" for key in kept),
        f"{len(due)} lines of garbage, {len(deleted)} of deletions; nothing was changed",
    )


async def _survey(bucket: str) -> "list[ShardGarbage]":
    from shoal_cluster.shard.garbage_survey import survey_garbage

    store = open_store(bucket)
    try:
        return await survey_garbage(store, SystemClock())
    finally:
        await store.close()


def _time(wall_ms: int) -> str:
    """Returns a moment as text. UTC: the bucket may be looked at from anywhere."""
    return datetime.fromtimestamp(wall_ms / 1000, UTC).isoformat(timespec="seconds")


def _tables(report: "CheckReport") -> list[Table]:
    tables = []
    if report.problems:
        tables.append(
            Table(
                title="Problems",
                columns=("object", "invariant", "what is wrong"),
                rows=[(each.key, each.invariant, each.message) for each in report.problems],
            )
        )
    if report.notes:
        tables.append(
            Table(title="Notes", columns=("note",), rows=[(str(note),) for note in report.notes])
        )
    return tables


def _require_directory(bucket: str) -> None:
    """Refuses a directory that is not there: opening it as a store would make it.

    Raises: NotFound.
    """
    scheme, separator, _ = bucket.partition("://")
    if not separator:
        directory = Path(bucket).expanduser()
    elif scheme == "file":
        directory = Path(unquote(urlsplit(bucket).path))
    else:
        return
    if not directory.is_dir():
        raise NotFound(f"there is no directory {bucket!r}", field="bucket")
