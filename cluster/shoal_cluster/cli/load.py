"""`shoal load`: brings a file of many rows into a collection, all at once, past the log."""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import click

import shoal
from shoal_cluster.cli.session import Session, client_options, shoal_command
from shoal_cluster.domain.clock import SystemClock
from shoal_cluster.domain.errors import InvalidRequest

_ID_DIGITS = 32


@click.command()
@click.argument("collection_name", metavar="COLLECTION")
@click.argument(
    "file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--ids",
    "ids_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For .npy: a text file with an id in each line.  [default: row numbers]",
)
@click.option(
    "--load-id",
    help="Names the load.  [default: made of the collection and the file's path, size and time]",
)
@click.option("--abort", is_flag=True, help="Give the load up instead; nothing of it is visible.")
@client_options
@shoal_command
def load(
    session: Session,
    collection_name: str,
    file: Path,
    ids_file: Path | None,
    load_id: str | None,
    abort: bool,
) -> None:
    """Loads FILE (.npy, .jsonl or .parquet) into COLLECTION.

    Rows become segments without passing through the log, and appear all at once. Points with the
    same ids are replaced. The same command again goes on where an interrupted one was, and does
    nothing once the load is committed.

    .jsonl has in each line {"id": …, "vector": […], "attributes": {…}, "payload": {…}}; .parquet
    has columns id, vector, payload (JSON) and attributes.
    """
    name = load_id or load_id_of(collection_name, file)
    with session.connect() as client:
        if abort:
            client.abort_load(collection_name, name)
            session.output.result(
                {"load_id": name, "aborted": True}, f"load {name} is aborted; nothing was changed"
            )
            return
        clock = SystemClock()
        began_s = clock.monotonic_s()
        skipped = 0
        session.output.step(f"load {name}")
        with ExitStack() as bars:
            bar = bars.enter_context(session.output.progress("rows staged"))
            building = False

            def told(progress: shoal.LoadProgress) -> None:
                nonlocal skipped, bar, building
                skipped = progress.rows_skipped
                if not progress.segments_total:
                    bar(progress.rows_staged, progress.rows_total)
                    return
                if not building:
                    building = True
                    bars.close()  # a terminal draws one bar at a time
                    bar = bars.enter_context(session.output.progress("segments built"))
                bar(progress.segments_done, progress.segments_total)

            result = client.load(
                collection_name,
                file,
                ids=None if ids_file is None else _ids_of(ids_file),
                load_id=name,
                progress=told,
            )
        took_s = clock.monotonic_s() - began_s
    session.output.result(
        {
            "load_id": result.load_id,
            "rows": result.rows,
            "rows_skipped": skipped,
            "seconds": round(took_s, 3),
        },
        f"{result.rows} rows are in {collection_name} (load {result.load_id}), "
        f"{skipped} of them staged before; {took_s:.1f} s",
    )


def load_id_of(collection: str, file: Path) -> str:
    """Returns the same id for the same file, another once it has changed."""
    found = file.stat()
    named = f"{collection}\0{file.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    return hashlib.sha256(named.encode()).hexdigest()[:_ID_DIGITS]


def _ids_of(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} holds no ids: {error}", field="ids") from error
