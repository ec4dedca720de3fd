import subprocess
import sys


def test_the_sdk_imports_neither_ray_nor_faiss_nor_the_server() -> None:
    """In a fresh interpreter, because this one has imported much already."""
    script = (
        "import sys, shoal\n"
        "heavy = {'ray', 'faiss', 'shoal_cluster', 'obstore', 'pydantic', 'pandas'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=paths,
        timeout=60,
    )
    assert loaded.stdout.strip() == "[]"
