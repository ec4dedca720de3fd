"""Prints what a bench measured."""

from collections.abc import Mapping
from typing import Any, Final

from tests.bench import bulk, writes
from tests.bench.stages import STAGES

_PATH_NAMES: Final = {
    "raw": "raw FAISS, in process",
    "raw_paced": "raw FAISS, paced like the SDK",
    "raw_segments": "raw, the shard's segments",
    "link": "through a link",
    "sdk": "SDK as installed (lane)",
    "grpc": "through gRPC and SDK",
    "grpc_stream": "gRPC stream, no SDK",
    "sdk_payload": "SDK with payloads",
    "raw_cores": "raw FAISS, a thread a core",
    "raw_batch": "raw FAISS, batches of 64",
    "sdk_batch": "SDK, batches of 64",
}


def render(bench: Mapping[str, Any]) -> str:
    """Returns the report; `bench` is what build/bench.json holds."""
    machine, collection = bench["machine"], bench["collection"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, load average {machine['load_average_1min']} before",
        ", ".join(f"{name} {version}" for name, version in bench["versions"].items()),
        f"{collection['rows']:,} rows of {collection['corpus']!r} x {collection['dimension']}, "
        f"k {collection['k']}, declared recall {collection['recall_target']}; one shard, one "
        f"replica, {collection['segments']} segment{'s' * (collection['segments'] != 1)}, "
        f"{collection['memtable_rows']} rows not indexed",
        "",
    ]
    for searches in bench["searches"]:
        lines += _searches(searches, clients=bench["size"]["clients"], target_ms=bench["target_ms"])
    lines += writes.render(bench["load"], bench["writes"])
    lines += bulk.render(bench["bulk"])
    lines += ["", "3 KiB over a link against a raw echo, unix socket"]
    for each in bench["links"]:
        lines.append(
            f"  {each['shape']:18} p50 {each['p50_us']:7.1f} µs, raw {each['raw_p50_us']:7.1f} µs, "
            f"ratio {each['p50_ratio']}"
        )
    lines += ["", "processes of the cluster, idle"]
    for each in bench["processes"]:
        lines.append(
            f"  {each['process'][:34]:34} {each['threads']:4} threads {each['memory_mib']:6} MiB "
            f"{each['idle_cpu_percent']:6.1f} % processor"
        )
    return "\n".join(lines)


def _searches(searches: Mapping[str, Any], *, clients: int, target_ms: float) -> list[str]:
    """Returns the lines about one recall target."""
    lines = [
        f"recall {searches['recall_target']} asked for; raw rescores {searches['raw_depth']} rows",
        f"{'':28}{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}{'queries/s':>11}{'recall':>8}"
        f"{'p50 ratio':>11}{'q/s ratio':>11}",
        *(_path_line(each) for each in searches["paths"]),
        "",
        f"p50 minus raw p50, one client: gRPC {searches['p50_minus_raw_ms_1_client_grpc']:.2f} ms "
        f"(target at most {target_ms} on an idle machine), SDK "
        f"{searches['p50_minus_raw_ms_1_client_tight']:.2f} ms; SDK minus raw at the same pace "
        f"{searches['p50_minus_raw_ms_1_client']:.2f} ms",
        f"queries/s over raw FAISS on all cores: SDK, {clients} clients "
        f"{searches['e2e_over_raw']:.2f}, gRPC {searches['grpc_over_raw_8_clients']:.2f}, "
        f"a stream of gRPC {searches['grpc_stream_over_raw_8_clients']:.2f}, "
        f"batches of 64 over raw batches {searches['e2e_over_raw_batch64']:.2f}",
        "",
        f"stages of a query, ms (typical of {searches['stages_queries']} with explain)",
        f"  {'':12}{'SDK':>8}{'gRPC':>8}",
    ]
    spent, over_grpc = searches["stages_ms"], searches["grpc_stages_ms"]
    lines += [
        f"  {stage:12}{spent[stage]:8.3f}{over_grpc[stage]:8.3f}  {meaning}"
        for stage, meaning in STAGES
    ]
    lines += [
        f"  {'sum':12}{searches['stages_sum_ms']:8.3f}{searches['grpc_stages_sum_ms']:8.3f}  end "
        f"to end p50 {spent['end to end p50']:.3f} and {over_grpc['end to end p50']:.3f}",
        "processor time of a query, ms: " + _processor_times(searches["processor_ms_per_query"]),
        "the same over gRPC, ms: " + _processor_times(searches["grpc_processor_ms_per_query"]),
        "",
    ]
    return lines


def _processor_times(by_role: Mapping[str, float]) -> str:
    return ", ".join(f"{role} {ms:.2f}" for role, ms in by_role.items())


def _path_line(figures: Mapping[str, Any]) -> str:
    return (
        f"{_PATH_NAMES[figures['path']]:28}{figures['clients']:8}{figures['p50_ms']:9.2f}"
        f"{figures['p99_ms']:9.2f}{figures['queries_per_s']:11.0f}{figures['recall']:8.4f}"
        f"{figures['p50_ratio']:11.2f}{figures['queries_ratio']:11.2f}"
    )
