"""Draws recall against latency of every setting that was tried, as SVG and PNG.

    python -m tests.bench.peers.curves build/bench-peers.json

Needs matplotlib, which only the bench's own environment has.
"""

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("figures", type=Path)
    path = parser.parse_args().figures
    figure = draw(json.loads(path.read_text()))
    for ending in (".svg", ".png"):
        figure.savefig(path.with_suffix(ending), dpi=120)
    print(f"curves are in {path.with_suffix('.svg')} and {path.with_suffix('.png')}")


def draw(bench: dict[str, Any]) -> Any:
    """Returns the figure: a panel a condition, up and left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = bench["conditions"]
    figure, panels = pyplot.subplots(
        1, len(conditions), figsize=(6 * len(conditions), 5.5), sharey=True, squeeze=False
    )
    engines = [each for each in bench["engines"] if each.get("sweep")]
    colours = pyplot.get_cmap("tab10")
    for panel, asked in zip(panels[0], conditions, strict=True):
        for number, engine in enumerate(engines):
            tried = [
                (each["recall"], each["mean_ms"])
                for swept in engine["sweep"]
                if swept["condition"] == asked["condition"]
                for chain in swept["tried"]
                for each in chain
            ]
            best = cheapest_at(tried)
            panel.plot(
                [miss(recall) for recall, _ in best],
                [ms for _, ms in best],
                marker="o",
                markersize=4,
                linestyle="-" if engine["networked"] else "--",
                color=colours(number % 10),
                label=engine["engine"],
            )
        for target in bench["targets"]:
            panel.axvline(miss(target), color="grey", linewidth=0.8, linestyle=":")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlim(miss(0.5), miss(1.0) / 1.3)
        ticks = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
        panel.set_xticks([miss(each) for each in ticks], [str(each) for each in ticks])
        panel.minorticks_off()
        panel.set_xlabel(f"recall@{bench['k']}")
        panel.set_title(_title(asked))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms a query, one client")
    panels[0][-1].legend(fontsize=8)
    rows = bench["size"]["rows"]
    figure.suptitle(f"{rows:,} rows of {bench['corpus']!r}; dashed: in process")
    figure.tight_layout()
    return figure


def cheapest_at(tried: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the settings that no other beats in both recall and cost, by recall."""
    best: list[tuple[float, float]] = []
    for recall, ms in sorted(tried, key=lambda each: (-each[0], each[1])):
        if not best or ms < best[-1][1]:
            best.append((recall, ms))
    return best[::-1]


def miss(recall: float) -> float:
    """Returns the share missed, at least 1 in 2,000, to be drawn on a logarithmic axis."""
    return max(1 - recall, 5e-4)


def _title(asked: dict[str, Any]) -> str:
    condition = asked["condition"]
    if condition is None:
        return "no filter"
    return f"{condition['column']} = {condition['value']} ({asked['selectivity']:.1%})"


if __name__ == "__main__":
    main()
