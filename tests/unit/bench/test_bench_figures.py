"""Which of several recall targets' figures a version is compared by."""

from tests.bench.__main__ import _worst


def test_each_figure_is_the_worst_over_the_recall_targets() -> None:
    near = {"p50_minus_raw_ms_1_client": 0.5, "e2e_over_raw": 0.4, "grpc_over_raw_8_clients": 0.3}
    deep = {"p50_minus_raw_ms_1_client": 0.4, "e2e_over_raw": 0.5, "grpc_over_raw_8_clients": 0.2}
    for rows, name in ((100_000, "100k"), (1_000_000, "1m")):
        assert _worst([near, deep], rows) == {
            "p50_minus_raw_ms_1_client": 0.5,
            "e2e_over_raw": 0.4,
            "grpc_over_raw_8_clients": 0.2,
            f"e2e_over_raw_8_clients_{name}": 0.4,
        }
