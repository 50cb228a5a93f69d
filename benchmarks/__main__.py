"""``python -m benchmarks``: one table, printed and written as JSON with the machine, the versions and the seeds."""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import embedded, loss, real
from benchmarks.measure import Row, Spread, machine

SEEDS = {"scenes": "validation, from 0 on", "random weights and inputs": 0}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.replace("``", ""))
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="measured rounds per figure; default 7")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only figures whose name contains one of these words")
    parser.add_argument("--real", action="store_true", help="also the real size: 6 GB on disk, 18 GB of memory")
    parser.add_argument("--folder", type=Path, help="where to store the random weights; default a temporary folder")
    parser.add_argument("--hkproj", type=Path, help="a checkout of hkproj/pytorch-paligemma")
    parser.add_argument("--open-clip", type=Path, help="the file src/open_clip/loss.py of mlfoundations/open_clip")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks.json"), help="default out/benchmarks.json")
    args = parser.parse_args(argv)
    for path in (args.hkproj and args.hkproj / "modeling_gemma.py", args.open_clip):
        if path and not path.is_file():
            parser.error(f"there is no file {path}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    with tempfile.TemporaryDirectory() as temporary:
        rows, points = measure_all(args, args.folder or Path(temporary))
    print(table(rows))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "seeds": SEEDS, "rounds": args.rounds, "rows": [asdict(row) for row in rows]}
    args.json.write_text(json.dumps(content | {"growth": points}, indent=2, ensure_ascii=False) + "\n")
    if points:
        embedded.draw_growth(points, args.json.with_name("growth.png"))
    print(f"Wrote {args.json}.", file=sys.stderr)
    return 0


def measure_all(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, list]]:
    """Measures every requested figure, one after the other, so that none disturbs another."""
    few = max(1, args.rounds // 2)
    plan = {
        "decode 1": partial(embedded.decode, 1, args.rounds),
        "decode 2": partial(embedded.decode, 2, args.rounds),
        "caption 1": partial(embedded.caption, 1, args.rounds),
        "caption 16": partial(embedded.caption, 16, args.rounds),
        "training": partial(embedded.training_step, args.rounds),
        "start": partial(embedded.cold_start, args.rounds),
        "growth": partial(embedded.growth, args.rounds),
        "sigmoid": partial(loss.sigmoid_loss, max(1, args.rounds // 3), args.open_clip),
    }
    if args.real:
        plan["real cpu"] = partial(real.on_cpu, folder, args.hkproj, few)
    if args.real and torch.cuda.is_available():
        plan["real gpu"] = partial(real.on_gpu, folder, args.rounds)
    rows, points = [], {}
    for name, run in plan.items():
        if args.only and not any(word in name for word in args.only):
            continue
        print(f"measuring: {name}", file=sys.stderr)
        found = run()
        if name == "growth":
            found, points = found
        rows += found if isinstance(found, list) else [found]
    if args.real and not torch.cuda.is_available() and not args.only:
        rows.append(Row("real size, GPU", "", {"all": "absent: no CUDA GPU here"}))
    return rows, points


def table(rows: list[Row]) -> str:
    """Markdown: figure, measurements, ratios, target. Medians, with minimum and maximum in brackets."""
    lines = ["| figure | measured | ratio | target |", "|---|---|---|---|"]
    for row in rows:
        measured = [f"{n}: {v} {row.unit if isinstance(v, Spread) else ''}".rstrip() for n, v in row.measured.items()]
        ratios = [f"{name}: {value}" for name, value in row.ratios.items()]
        measured += [row.note] if row.note else []
        lines.append(f"| {row.figure} | {'<br>'.join(measured)} | {'<br>'.join(ratios)} | {row.target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
