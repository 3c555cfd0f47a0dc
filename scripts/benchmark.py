"""Measures clipmini against what its users run today; ratios are of one run.

benchmark.py data     the loader, against webdataset's pipeline as open_clip runs it and torch's data set of loose files
"""

import argparse

import benchmark_data


def main() -> None:
    """Run a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    benchmark_data.add_parser(commands)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
