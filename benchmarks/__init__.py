"""Speed and memory beside others doing the same work; `python -m benchmarks --help`. The package never imports this."""
