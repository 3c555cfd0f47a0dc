"""Measures clipmini against what its users run today; ratios are of one run.

benchmark.py data        the loader, against webdataset's pipeline as open_clip runs it, and torch's set of loose files
benchmark.py loss        the losses, against open_clip's and torch's; and a step in micro-batches against one at once
benchmark.py evaluation  ImageNet's zero-shot classifier, against open_clip's; and retrieval, against a whole matrix
benchmark.py checkpoint  how long the training stands still for a checkpoint, against Lightning's ModelCheckpoint
benchmark.py train       whole runs, against open_clip's trainer: samples a second, memory, start, what is learned
benchmark.py locked      a locked image tower whose features are kept, against one that encodes each picture again
benchmark.py recipes     fine-tuning, a curriculum, a teacher and views on the embedded sample, with some seeds
benchmark.py search      exact search among a million embeddings: time and memory, and by a graph
benchmark.py scale       bytes moved and held by a step on up to 1,024 processes, from formulas that are checked
"""

import argparse

import benchmark_checkpoint
import benchmark_data
import benchmark_evaluation
import benchmark_locked
import benchmark_loss
import benchmark_recipes
import benchmark_scale
import benchmark_search
import benchmark_train

BENCHMARKS = (
    *(benchmark_data, benchmark_loss, benchmark_evaluation, benchmark_checkpoint),
    *(benchmark_train, benchmark_locked, benchmark_recipes, benchmark_search, benchmark_scale),
)


def main() -> None:
    """Run a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for benchmark in BENCHMARKS:
        benchmark.add_parser(commands)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
