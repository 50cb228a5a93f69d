"""The command line: ``python -m minivlm COMMAND --help``.

A command imports what it needs when it runs, so that help and mistyped options are answered at once. A user's mistake
is one sentence on stderr and exit code 2; ``--debug`` shows where it was raised.
"""

import argparse
import re
import sys
from pathlib import Path

from minivlm import __version__

ANSWER = 128  # tokens by default: four objects with their masks take about 95
LONGEST_ANSWER = 8192  # tokens: what Gemma was trained to read and write at most
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = new_parser(argv).parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        note(f"minivlm {args.command}: {error}")
        return 2
    return 0


def new_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser. Only the command that ``argv`` names gets its options: those of ``train`` need torch to be listed."""
    about = "PaliGemma, small enough to read in an evening."
    parser = argparse.ArgumentParser(prog="python -m minivlm", description=about)
    parser.add_argument("--version", action="version", version=f"minivlm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        if name in argv:
            add_arguments(command)
    return parser


def note(text: str) -> None:
    """Says something on stderr, so that stdout holds answers alone."""
    print(text, file=sys.stderr)


# --- what several commands share -----------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="C", help="a folder or hub id; the embedded checkpoint when not given")
    parser.add_argument("--revision", help="the hub branch, tag or commit to use")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps; a CUDA GPU where there is one when not given")
    parser.add_argument("--dtype", choices=DTYPES, help="the weights' type; as stored when not given")


def load(args: argparse.Namespace) -> tuple:
    """The model, the processor and the folder that the arguments of ``add_model_arguments`` ask for."""
    import torch

    import minivlm
    from minivlm import hub

    device = find_device(args.device)
    folder = hub.resolve(args.checkpoint, args.revision)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        model = minivlm.PaliGemma.from_pretrained(folder, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise ValueError(f"{folder} does not fit into {device}: try --dtype bfloat16 or --device cpu.") from None
    return model, minivlm.Processor.from_pretrained(folder), folder


def find_device(name: str | None) -> str:
    """The device asked for, if it is there; a CUDA GPU or else the CPU when ``name`` is None."""
    import torch

    gpus = torch.cuda.device_count()
    there = {"cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))}
    if torch.backends.mps.is_available():
        there.add("mps")
    if name is not None and name not in there:
        raise ValueError(f"There is no device {name!r} here, only {', '.join(sorted(there))}.")
    return name or ("cuda" if gpus else "cpu")


def check_output(path: Path | None) -> None:
    """Better to hear before a long computation that its result cannot be written."""
    if path is not None and path.suffix.lower() != ".png":
        raise ValueError(f"Pictures are written as PNG, so {str(path)!r} must end in .png.")
    if path is not None and path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name a file to write.")


def load_masks(folder: Path):
    """The mask VQ-VAE in a checkpoint's folder; None where none can be read, and then stderr is told what to do."""
    from minivlm.vqvae import MaskVQVAE

    try:
        return MaskVQVAE.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        note(f"Boxes without masks: {error}")


def find_boxes(answer: str, size: tuple[int, int]) -> list:
    """The detections in an answer about a picture of ``size`` pixels; says on stderr what could not be read."""
    from minivlm import locations

    if "<loc" not in answer:
        return []
    parsed = locations.parse_detections(answer, *size)
    for problem in parsed.problems:
        note(problem)
    return parsed.detections


def without_places(answer: str) -> str:
    """An answer as people read it: "<loc0102><loc0051>… cat" becomes "cat", and no words at all become "(nothing)"."""
    return re.sub(r"<(loc|seg)\d+>\s*", "", answer).strip() or "(nothing)"


# --- generate ------------------------------------------------------------------------------------------------------


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, type=Path, help="a picture file")
    examples = '"caption en" "answer en what is this?" "detect cat ; dog" "segment cat"'
    parser.add_argument("--prompt", required=True, nargs="+", help=f"one or more, such as {examples}")
    add_model_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=ANSWER, metavar="N", help=f"longest answer; default {ANSWER}"
    )
    parser.add_argument("--sample", action="store_true", help="draw tokens at random instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, metavar="T", help="with --sample: below 1 surer, above 1 wilder")
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample: among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="with --sample: among the likeliest that make up P")
    parser.add_argument("--seed", type=int, help="with --sample: the same seed gives the same answer")
    vqvae = "the mask VQ-VAE: a .npz file or a folder; that in the checkpoint's folder when not given"
    parser.add_argument("--masks", type=Path, metavar="FILE", help=vqvae)
    out = "write the picture with its boxes, masks and answers"
    parser.add_argument("--save", type=Path, metavar="OUT.png", help=out)


def generation_options(args: argparse.Namespace) -> dict:
    """The arguments as ``minivlm.generate`` wants them, checked before any model is loaded."""
    from minivlm.generation import GenerationConfig

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.sample:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} changes nothing without --sample: add it, or leave {names} out.")
    if not 0 <= given.get("seed", 0) < 2**63:
        raise ValueError(f"--seed must be an integer from 0 to 2**63 - 1, not {args.seed}.")
    if args.max_new_tokens > LONGEST_ANSWER:
        raise ValueError(f"--max-new-tokens must be at most {LONGEST_ANSWER}, not {args.max_new_tokens}.")
    options = given | {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    GenerationConfig(**options)
    return options


def run_generate(args: argparse.Namespace) -> None:
    import minivlm
    from minivlm.processor import open_image
    from minivlm.vqvae import MaskVQVAE

    options = generation_options(args)
    check_output(args.save)
    image = open_image(args.image)
    vqvae = MaskVQVAE.from_pretrained(args.masks) if args.masks else None
    model, processor, folder = load(args)
    if len(args.prompt) == 1:  # shown while it is written
        answers = [minivlm.generate(model, processor, image, args.prompt[0], stream=print_piece, **options)]
        print()
    else:
        answers = minivlm.generate(model, processor, image, args.prompt, **options)
    if vqvae is None and any("<seg" in answer for answer in answers):
        vqvae = load_masks(folder)
    found = []
    for prompt, answer in zip(args.prompt, answers, strict=True):
        if len(args.prompt) > 1:
            print(f"{prompt}: {answer}")
        found += print_boxes(answer, image.size, vqvae)
    if args.save:
        lines = [f"{p}: {without_places(a)}" for p, a in zip(args.prompt, answers, strict=True)]
        save_sheet([(image, found, lines)], args.save)


def print_piece(text: str) -> None:
    print(text, end="", flush=True)


def print_boxes(answer: str, size: tuple[int, int], vqvae, indent: str = "  ") -> list[tuple]:
    """Prints each box and mask of an answer in pixels; returns the detections, each with its mask or None."""
    from minivlm.course.viz.boxes import in_words

    found = with_masks(find_boxes(answer, size), size, vqvae)
    for detection, mask in found:
        print(f"{indent}{in_words(detection, mask)}")
    return found


def with_masks(detections: list, size: tuple[int, int], vqvae) -> list[tuple]:
    """Each detection with its mask; with None where it has no codes, or there is no VQ-VAE to read them."""
    masks = vqvae.masks_from_detections(detections, *size) if vqvae else [None] * len(detections)
    return list(zip(detections, masks, strict=True))


def save_sheet(panels: list, path: Path) -> None:
    """Writes pictures with their boxes and masks, and their lines below them.

    ``panels`` holds (image, [(detection, mask), …], lines).
    """
    from minivlm.course.viz import draw_boxes, draw_sheet

    pictures = [draw_boxes(image, [d for d, _ in found], [m for _, m in found]) for image, found, _ in panels]
    draw_sheet([(p, "\n".join(lines)) for p, (_, _, lines) in zip(pictures, panels, strict=True)]).save(path)
    note(f"Wrote {path}.")


# --- demo ----------------------------------------------------------------------------------------------------------

# Split and seed of the scenes in data/images/scenes, the first of each kind: none chosen.
DEMO = (("validation", 0), ("validation", 1), ("pairs", 0), ("artist", 0))
SPLIT_MEANS = {
    "validation": "a new scene",
    "pairs": "a new scene with two objects that training never showed together",
    "artist": "a new scene by an artist whom training never showed",
}


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    out = Path("out/demo.png")
    parser.add_argument("--save", type=Path, default=out, metavar="OUT.png", help=f"picture to write; default {out}")


def run_demo(args: argparse.Namespace) -> None:
    """All four tasks on a few scenes that training never showed, with the truth beside what is wrong."""
    from minivlm import emoji

    check_output(args.save)
    model, processor, folder = load(args)
    vqvae = load_masks(folder)
    panels = []
    for split, seed in DEMO:
        scene = emoji.make_scene(seed, split)
        print(f"{SPLIT_MEANS[split]} ({split}, seed {seed})")
        panels.append(show_scene(model, processor, vqvae, scene))
        print()
    save_sheet(panels, args.save)
    python = ".venv/bin/python" if Path(sys.prefix) == Path.cwd() / ".venv" else "python"
    print(f"""
Next:
  make lab
    opens JupyterLab on the course
  {python} -m minivlm generate --image YOUR.png --prompt "caption en"
    asks about a picture of yours; this small model knows emoji, README.md says how to get one that knows photos""")


def show_scene(model, processor, vqvae, scene) -> tuple:
    """Asks for a caption, two answers, and every object twice; prints them and returns a panel for ``save_sheet``."""
    import minivlm
    from minivlm import emoji, hub
    from minivlm.processor import open_image

    image = open_image(hub.DATA / "images" / "scenes" / f"{scene.split}-{scene.seed}.png")
    names = " ; ".join(dict.fromkeys(thing.name for thing in scene.objects))
    asked = {"caption en": scene.captions["caption"]} | {q.prompt: q.answers for q in scene.questions[:2]}
    prompts = [*asked, f"detect {names}", f"segment {names}"]
    *answers, boxes, masks = minivlm.generate(model, processor, image, prompts, max_new_tokens=ANSWER)
    lines = []
    for (prompt, right), answer in zip(asked.items(), answers, strict=True):
        is_right = answer in right or emoji.same_caption(answer, right[0])
        lines.append(f"{prompt}: {answer or '(nothing)'}" + ("" if is_right else f"  (truth: {right[0]})"))
        print(f"  {lines[-1]}")
    print(f"  {prompts[-2]}: {len(scene.objects)} to find")
    detected = print_boxes(boxes, image.size, vqvae, indent="    ")
    segmented = print_masks(prompts[-1], masks, image.size, vqvae)
    return image, segmented or detected, lines


def print_masks(prompt: str, answer: str, size: tuple[int, int], vqvae) -> list[tuple]:
    """Prints the sizes of an answer's masks, in one line; returns the detections that have one, with it."""
    from minivlm.course.viz.boxes import area

    found = [(d, mask) for d, mask in with_masks(find_boxes(answer, size), size, vqvae) if mask is not None]
    print(f"  {prompt}: " + ("; ".join(f"{d.label or '(no name)'}, {area(mask)}" for d, mask in found) or "(nothing)"))
    return found


# --- evaluate, train, doctor ---------------------------------------------------------------------------------------


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="scenes of each split; default 1000")
    parser.add_argument("--split", nargs="+", metavar="S", help="validation, pairs, artist; all when not given")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures to this file")


def run_evaluate(args: argparse.Namespace) -> None:
    from minivlm.emoji import evaluation

    if args.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, not {args.scenes}.")
    for split in args.split or ():
        if split not in SPLIT_MEANS:
            raise ValueError(f"There is no split {split!r} to evaluate on, only {', '.join(SPLIT_MEANS)}.")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"There is no folder {str(args.json.parent)!r} to write {args.json.name} into.")
    model, processor, folder = load(args)
    evaluation.run(model, processor, args.scenes, tuple(args.split or SPLIT_MEANS), args.json, load_masks(folder))


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    from minivlm.emoji import recipe

    recipe.add_arguments(parser)


def run_train(args: argparse.Namespace) -> None:
    from minivlm.emoji import recipe

    recipe.run(args)


def run_doctor(args: argparse.Namespace) -> None:
    from minivlm import doctor

    print(doctor.report())


# --- grade ---------------------------------------------------------------------------------------------------------


def add_grade_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("submissions", type=Path, help="a folder with NAME.ipynb, or with a folder for each student")
    out = Path("grades.csv")
    parser.add_argument("--out", type=Path, default=out, metavar="OUT.csv", help=f"marks to write; default {out}")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="of the random cases; default 1234")
    limit = "for one notebook; a cell or an exercise may take a quarter of it; default 120"
    parser.add_argument("--time-limit", type=float, default=120.0, metavar="S", help=f"seconds {limit}")
    parser.add_argument("--chapter", metavar="NN", help="grade this one alone, such as 05; all handed in otherwise")


def run_grade(args: argparse.Namespace) -> None:
    from minivlm.course.grading import grader

    grader.grade(args.submissions, args.out, args.seed, args.time_limit, args.chapter)
    note(f"Wrote {args.out}, and {grader.messages_path(args.out)} with a sentence for every lost mark.")


COMMANDS = {
    "demo": ("show what the embedded checkpoint can do", add_demo_arguments, run_demo),
    "generate": ("answer prompts about a picture", add_generate_arguments, run_generate),
    "evaluate": ("measure a checkpoint on held-out scenes", add_evaluate_arguments, run_evaluate),
    "train": ("train a small PaliGemma from nothing", add_train_arguments, run_train),
    "grade": ("grade a folder of notebooks, a row per student", add_grade_arguments, run_grade),
    "doctor": ("say what is installed and what would run, for a bug report", lambda parser: None, run_doctor),
}

if __name__ == "__main__":
    sys.exit(main())
