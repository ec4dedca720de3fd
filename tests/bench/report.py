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
        f"k {collection['k']}, recall target {collection['recall_target']}; one shard, one "
        f"replica, {collection['segments']} segment{'s' * (collection['segments'] != 1)}, "
        f"{collection['memtable_rows']} rows not "
        f"indexed; raw rescores {collection['raw_depth']} rows",
        "",
        f"{'':28}{'clients':>8}{'p50 ms':>9}{'p99 ms':>9}{'queries/s':>11}{'recall':>8}"
        f"{'p50 ratio':>11}{'q/s ratio':>11}",
    ]
    lines += [_path_line(each) for each in bench["paths"]]
    lines += [
        "",
        f"p50 minus raw p50, one client: gRPC {bench['p50_minus_raw_ms_1_client_grpc']:.2f} ms "
        f"(target at most {bench['target_ms']} on an idle machine), SDK "
        f"{bench['p50_minus_raw_ms_1_client_tight']:.2f} ms; SDK minus raw at the same pace "
        f"{bench['p50_minus_raw_ms_1_client']:.2f} ms",
        f"queries/s over raw FAISS on all cores: SDK, {bench['size']['clients']} clients "
        f"{bench['e2e_over_raw']:.2f}, gRPC {bench['grpc_over_raw_8_clients']:.2f}, "
        f"a stream of gRPC {bench['grpc_stream_over_raw_8_clients']:.2f}, "
        f"batches of 64 over raw batches {bench['e2e_over_raw_batch64']:.2f}",
        "",
        f"stages of a query, ms (typical of {bench['stages_queries']} with explain)",
        f"  {'':12}{'SDK':>8}{'gRPC':>8}",
    ]
    spent, over_grpc = bench["stages_ms"], bench["grpc_stages_ms"]
    lines += [
        f"  {stage:12}{spent[stage]:8.3f}{over_grpc[stage]:8.3f}  {meaning}"
        for stage, meaning in STAGES
    ]
    lines += [
        f"  {'sum':12}{bench['stages_sum_ms']:8.3f}{bench['grpc_stages_sum_ms']:8.3f}  end to end "
        f"p50 {spent['end to end p50']:.3f} and {over_grpc['end to end p50']:.3f}",
        "processor time of a query, ms: "
        + ", ".join(f"{role} {ms:.2f}" for role, ms in bench["processor_ms_per_query"].items()),
        "the same over gRPC, ms: "
        + ", ".join(
            f"{role} {ms:.2f}" for role, ms in bench["grpc_processor_ms_per_query"].items()
        ),
        "",
    ]
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


def _path_line(figures: Mapping[str, Any]) -> str:
    return (
        f"{_PATH_NAMES[figures['path']]:28}{figures['clients']:8}{figures['p50_ms']:9.2f}"
        f"{figures['p99_ms']:9.2f}{figures['queries_per_s']:11.0f}{figures['recall']:8.4f}"
        f"{figures['p50_ratio']:11.2f}{figures['queries_ratio']:11.2f}"
    )
