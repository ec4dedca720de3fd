"""Prints what a comparison found: loads, a table a target, and where Shoal is behind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.bench.peers.known import SHOAL
from tests.bench.peers.sweep import text_of

Figures = Mapping[str, Any]


def render(bench: Figures) -> str:
    """Returns the report; `bench` is what build/bench-peers.json holds."""
    machine, size = bench["machine"], bench["size"]
    done = [engine for engine in bench["engines"] if "failed" not in engine]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, load average {machine['load_average_1min']} before",
        f"{size['rows']:,} rows of {bench['corpus']!r} x 384, recall@{bench['k']}; * answers over "
        "a socket",
        "",
        *_loads(done, bench["engines"]),
    ]
    for each in bench["conditions"]:
        for target in bench["targets"]:
            lines += ["", *_table(done, each, target, size["clients"])]
    failed = [engine for engine in bench["engines"] if "failed" in engine]
    lines += [""] + [
        f"{engine['engine']} is not in the tables: failed at {engine['failed']['at']}: "
        f"{engine['failed']['error']}"
        for engine in failed
    ]
    return "\n".join([*lines, *verdict(bench)])


def verdict(bench: Figures) -> list[str]:
    """Returns where Shoal is behind an engine that answers over a socket, and by how much."""
    ours = next((each for each in bench["engines"] if each["engine"] == SHOAL), None)
    if ours is None or "failed" in ours:
        return ["Shoal was not measured: nothing is compared"]
    others = [
        each
        for each in bench["engines"]
        if each["engine"] != SHOAL and "failed" not in each and each["networked"]
    ]
    behind = [line for other in others for line in _behind(ours, other)]
    missed = [
        f"Shoal misses recall {each['target']} {_where(each)}: {each['recall']}"
        for each in ours["measured"]
        if not each["reached"] and each["clients"] == 1
    ]
    if not others:
        return [*missed, "no other engine that answers over a socket was measured"]
    names = ", ".join(label(each) for each in others)
    return [*missed, *(behind or [f"Shoal is ahead of {names} everywhere"])]


def _behind(ours: Figures, other: Figures) -> Iterator[str]:
    ratio = ours["load"]["rows_per_s"] / max(other["load"]["rows_per_s"], 1)
    if ratio < 1:
        yield f"Shoal is behind {label(other)}: {ratio:.2f} of its rows/s to fully indexed"
    theirs = {_key(each): each for each in other["measured"]}
    for mine in ours["measured"]:
        found = theirs.get(_key(mine))
        # One that does not reach the recall is not faster at it.
        if found is None or not found["reached"]:
            continue
        ratio = mine["queries_per_s"] / found["queries_per_s"]
        if ratio < 1:
            yield (
                f"Shoal is behind {label(other)}: {ratio:.2f} of its queries/s at recall "
                f"{mine['target']}, {mine['clients']} clients, {_where(mine)}"
            )


def label(engine: Figures) -> str:
    """Returns `shoal*`, or with a build `pgvector* (m 16, ef_construction 128)`."""
    star = "*" if engine.get("networked") else ""
    build = text_of(engine.get("build") or {})
    return f"{engine['engine']}{star}" + (f" ({build})" if build != "-" else "")


def _loads(done: Sequence[Figures], every: Sequence[Figures]) -> Iterator[str]:
    first_ms = every[0]["yardstick_ms"] if every else 1.0
    yield (
        f"{'':46}{'rows/s':>8}{'MiB':>7}{'machine':>9}  seconds; versions; settings "
        "(machine: time of a fixed computation before, against the first)"
    )
    for engine in done:
        load = engine["load"]
        seconds = ", ".join(f"{step} {spent}" for step, spent in load["seconds"].items())
        versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
        yield (
            f"{label(engine):46}{load['rows_per_s']:8,}{engine['memory_mib']:7,}"
            f"{engine['yardstick_ms'] / first_ms:9.2f}  {seconds}; {versions}; "
            f"{text_of(load['settings'])}" + (f"; {load['note']}" if load["note"] else "")
        )


def _table(
    done: Sequence[Figures], asked: Figures, target: float, clients: Sequence[int]
) -> Iterator[str]:
    most = max(clients)
    rows = []
    for engine in done:
        found = {
            each["clients"]: each
            for each in engine["measured"]
            if each["condition"] == asked["condition"] and each["target"] == target
        }
        if found:
            rows.append((engine, found))
    ours = next((found for engine, found in rows if engine["engine"] == SHOAL), None)
    rows.sort(key=lambda row: -row[1][most]["queries_per_s"])
    yield f"recall {target}, {_where(asked)}"
    yield (
        f"  {'':44}{'recall':>8}{'p50 ms 1':>10}{'q/s 1':>8}{f'q/s {most}':>9}"
        f"{f'p99 ms {most}':>11}{'of Shoal':>10}  setting"
    )
    for engine, found in rows:
        share = ""
        if ours is not None:
            share = f"{found[most]['queries_per_s'] / ours[most]['queries_per_s']:.2f}"
        missed = "" if found[most]["reached"] else f"  {_why_missed(engine, asked)}"
        yield (
            f"  {label(engine):44}{found[most]['recall']:8.4f}{found[1]['p50_ms']:10.2f}"
            f"{found[1]['queries_per_s']:8.0f}{found[most]['queries_per_s']:9.0f}"
            f"{found[most]['p99_ms']:11.2f}{share:>10}  {text_of(found[most]['setting'])}{missed}"
        )


def _why_missed(engine: Figures, asked: Figures) -> str:
    finished = all(
        swept["finished"] for swept in engine["sweep"] if swept["condition"] == asked["condition"]
    )
    return "MISSED: no setting reaches it" if finished else "MISSED: no time to try every setting"


def _key(measured: Figures) -> tuple[str, float, int]:
    return str(measured["condition"]), measured["target"], measured["clients"]


def _where(asked: Figures) -> str:
    condition = asked["condition"]
    if condition is None:
        return "no filter"
    return f"{condition['column']} = {condition['value']} ({asked['selectivity']:.1%} of the rows)"
