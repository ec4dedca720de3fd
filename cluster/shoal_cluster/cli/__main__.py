"""`python -m shoal_cluster.cli`: the command `shoal` where its script is not on PATH."""

from shoal_cluster.cli.main import main

if __name__ == "__main__":
    main()
