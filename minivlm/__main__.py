"""The command line: ``python -m minivlm COMMAND --help``.

Each command imports what it needs when it runs, so help and errors in options appear at once. A mistake of the user is
reported in one line on stderr, with exit code 2. ``--debug`` shows the traceback.
"""

import argparse
import os
import re
import sys
from datetime import datetime
from pathlib import Path

from minivlm import __version__

DEFAULT_NEW_TOKENS = 128  # four objects with their masks take about 95
CONTEXT_LENGTH = 8192  # tokens, the longest sequence that Gemma was trained on
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not if a notebook or a test replaced it
            stream.reconfigure(errors="backslashreplace")  # for consoles that have no ±, → or ×
    name = find_command(argv)
    try:
        try:
            args = new_parser(argv).parse_args(argv)  # here, because listing options can import torch and read data
            args.run(args)
        finally:
            sys.stdout.flush()  # at exit, an error could not be handled
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has finished
        discard_output()
        return 141  # as for a program that SIGPIPE ends
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            raise
        note(f"minivlm {name}: {error}")
        discard_output()
        return 2
    return 0


def find_command(argv: list[str]) -> str:
    """The command in ``argv``: the first argument that is no option. "" if there is none."""
    return next((argument for argument in argv if not argument.startswith("-")), "")


def discard_output() -> None:
    """Redirects stdout to nowhere if it cannot be written to any more, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def new_parser(argv: list[str]) -> argparse.ArgumentParser:
    """Builds the parser. Only the command in ``argv`` gets its options: listing those of ``train`` imports torch."""
    about = "PaliGemma, small enough to read in an evening."
    parser = argparse.ArgumentParser(prog="python -m minivlm", description=about)
    parser.add_argument("--version", action="version", version=f"minivlm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        command.set_defaults(run=run)
        if name == find_command(argv):
            add_arguments(command)
    return parser


def note(text: str) -> None:
    """Prints to stderr, so that stdout has only the answers."""
    print(text, file=sys.stderr)


# --- shared by several commands ------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="C", help="folder or hub id; default: the embedded checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    adapter = "folder of a LoRA adapter in peft's format, such as `finetune` writes"
    parser.add_argument("--adapter", type=Path, metavar="A", help=adapter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps; default: a CUDA GPU if there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; default: that of the checkpoint")


def load(args: argparse.Namespace) -> tuple:
    """Loads the model and processor of ``add_model_arguments`` and returns them with the checkpoint's folder."""
    import torch

    import minivlm
    from minivlm import hub
    from minivlm.training import lora

    device = find_device(args.device)
    folder = hub.resolve(args.checkpoint, args.revision)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        model = minivlm.PaliGemma.from_pretrained(folder, dtype=dtype, device=device)
    except torch.OutOfMemoryError:
        raise ValueError(f"{folder} does not fit into {device}: try --dtype bfloat16 or --device cpu.") from None
    if args.adapter is not None:
        lora.merge(lora.load(model, args.adapter))
    return model, minivlm.Processor.from_pretrained(folder), folder


def find_device(name: str | None) -> str:
    """The device ``name`` if it is available; if ``name`` is None, a CUDA GPU or else the CPU."""
    import torch

    gpus = torch.cuda.device_count()
    available = {"cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))}
    if torch.backends.mps.is_available():
        available.add("mps")
    if name is not None and name not in available:
        raise ValueError(f"There is no device {name!r} here, only {', '.join(sorted(available))}.")
    return name or ("cuda" if gpus else "cpu")


def check_output(path: Path | None, suffix: str = "") -> None:
    """Checks where a file will be saved, before a long computation rather than after it."""
    if path is None:
        return
    if path.suffix.lower() != (suffix or path.suffix.lower()):
        raise ValueError(f"Images are saved as PNG, so {str(path)!r} must end in .png.")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: pass the name of a file.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be saved: {str(folder)!r} is not a folder that can be written to.")


def load_vqvae(folder: Path):
    """Loads the mask VQ-VAE in a checkpoint's folder. If there is none, says on stderr what to do and returns None."""
    from minivlm.vqvae import MaskVQVAE

    try:
        return MaskVQVAE.from_pretrained(folder)
    except (FileNotFoundError, ValueError) as error:
        note(f"Boxes without masks: {error}")


def find_boxes(answer: str, size: tuple[int, int]) -> list:
    """The detections in an answer about an image of ``size`` pixels. Reports on stderr what could not be parsed."""
    from minivlm import locations

    if "<loc" not in answer:
        return []
    parsed = locations.parse_detections(answer, *size)
    for problem in parsed.problems:
        note(problem)
    return parsed.detections


def strip_location_tokens(answer: str) -> str:
    """An answer for people to read: "<loc0102><loc0051>… cat" becomes "cat"; if no text is left, "(nothing)"."""
    return re.sub(r"<(loc|seg)\d+>\s*", "", answer).strip() or "(nothing)"


# --- generate ------------------------------------------------------------------------------------------------------


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, type=Path, help="image file")
    examples = '"caption en" "answer en what is this?" "detect cat ; dog" "segment cat"'
    parser.add_argument("--prompt", required=True, nargs="+", help=f"one or more prompts, such as {examples}")
    add_model_arguments(parser)
    length = f"maximum length of an answer in tokens; default: {DEFAULT_NEW_TOKENS}"
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help=length)
    parser.add_argument("--sample", action="store_true", help="sample tokens instead of taking the most likely one")
    temperature = "with --sample: below 1 sharpens the distribution, above 1 flattens it"
    parser.add_argument("--temperature", type=float, metavar="T", help=temperature)
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample: only from the K most likely tokens")
    top_p = "with --sample: only from the most likely tokens that together have probability P"
    parser.add_argument("--top-p", type=float, metavar="P", help=top_p)
    parser.add_argument("--seed", type=int, help="with --sample: makes the answer reproducible")
    vqvae = "the mask VQ-VAE, a .npz file or a folder; default: the one in the checkpoint's folder"
    parser.add_argument("--masks", type=Path, metavar="FILE", help=vqvae)
    out = "save the image with its boxes, masks and answers"
    parser.add_argument("--save", type=Path, metavar="OUT.png", help=out)


def generation_options(args: argparse.Namespace) -> dict:
    """The options for ``minivlm.generate``, checked before a model is loaded."""
    from minivlm.generation import GenerationConfig

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.sample:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} cannot be used without --sample: add it, or leave out {names}.")
    if not 0 <= given.get("seed", 0) < 2**63:
        raise ValueError(f"--seed must be an integer from 0 to 2**63 - 1, not {args.seed}.")
    if args.max_new_tokens > CONTEXT_LENGTH:
        raise ValueError(f"--max-new-tokens must be at most {CONTEXT_LENGTH}, not {args.max_new_tokens}.")
    options = given | {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    GenerationConfig(**options)
    return options


def run_generate(args: argparse.Namespace) -> None:
    import minivlm
    from minivlm.processor import open_image
    from minivlm.vqvae import MaskVQVAE

    options = generation_options(args)
    check_output(args.save, ".png")
    image = open_image(args.image)
    vqvae = MaskVQVAE.from_pretrained(args.masks) if args.masks else None
    model, processor, folder = load(args)
    if len(args.prompt) == 1:  # printed while it is generated
        answers = [minivlm.generate(model, processor, image, args.prompt[0], stream=print_text, **options)]
        print()
    else:
        answers = minivlm.generate(model, processor, image, args.prompt, **options)
    if vqvae is None and any("<seg" in answer for answer in answers):
        vqvae = load_vqvae(folder)
    found = []
    for prompt, answer in zip(args.prompt, answers, strict=True):
        if len(args.prompt) > 1:
            print(f"{prompt}: {answer}")
        found += print_boxes(answer, image.size, vqvae)
    if args.save:
        lines = [f"{p}: {strip_location_tokens(a)}" for p, a in zip(args.prompt, answers, strict=True)]
        save_sheet([(image, found, lines)], args.save)


def print_text(text: str) -> None:
    print(text, end="", flush=True)


def print_boxes(answer: str, size: tuple[int, int], vqvae, indent: str = "  ") -> list[tuple]:
    """Prints each box and mask of an answer in pixels and returns the detections, each with its mask or None."""
    from minivlm.course.viz.boxes import in_words

    found = with_masks(find_boxes(answer, size), size, vqvae)
    for detection, mask in found:
        print(f"{indent}{in_words(detection, mask)}")
    return found


def with_masks(detections: list, size: tuple[int, int], vqvae) -> list[tuple]:
    """Pairs each detection with its mask, or with None if it has no codes or there is no VQ-VAE to decode them."""
    masks = vqvae.masks_from_detections(detections, *size) if vqvae else [None] * len(detections)
    return list(zip(detections, masks, strict=True))


def save_sheet(panels: list, path: Path) -> None:
    """Saves images with their boxes and masks, and lines of text below each.

    ``panels`` is a list of (image, [(detection, mask), …], lines).
    """
    from minivlm.course.viz import draw_boxes, draw_sheet

    figures = [draw_boxes(image, [d for d, _ in found], [m for _, m in found]) for image, found, _ in panels]
    draw_sheet([(f, "\n".join(lines)) for f, (_, _, lines) in zip(figures, panels, strict=True)]).save(path)
    note(f"Wrote {path}.")


# --- demo ----------------------------------------------------------------------------------------------------------

# Split and seed of the scenes in data/images/scenes: the first ones of each split, not hand-picked.
DEMO = (("validation", 0), ("validation", 1), ("pairs", 0), ("artist", 0))
SPLIT_DESCRIPTIONS = {
    "validation": "a new scene",
    "pairs": "a new scene with two objects that never appear together in training",
    "artist": "a new scene by an artist who never appears in training",
}


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    out = Path("out/demo.png")
    parser.add_argument("--save", type=Path, default=out, metavar="OUT.png", help=f"image to save; default: {out}")


def run_demo(args: argparse.Namespace) -> None:
    """Runs all four tasks on a few held-out scenes, and shows the truth next to wrong answers."""
    from minivlm import emoji

    check_output(args.save, ".png")
    model, processor, folder = load(args)
    vqvae = load_vqvae(folder)
    panels = []
    for split, seed in DEMO:
        scene = emoji.make_scene(seed, split)
        print(f"{SPLIT_DESCRIPTIONS[split]} ({split}, seed {seed})")
        panels.append(show_scene(model, processor, vqvae, scene))
        print()
    save_sheet(panels, args.save)
    python = ".venv/bin/python" if Path(sys.prefix) == Path.cwd() / ".venv" else "python"
    print(f"""
Next:
  make lab
    opens the course in JupyterLab
  {python} -m minivlm generate --image YOUR.png --prompt "caption en"
    answers about your own image; this small model knows emoji, and README.md says how to get one that knows photos""")


def show_scene(model, processor, vqvae, scene) -> tuple:
    """Prints a caption, two answers, and all boxes and masks of a scene. Returns a panel for ``save_sheet``."""
    import minivlm
    from minivlm import emoji, hub
    from minivlm.processor import open_image

    image = open_image(hub.DATA / "images" / "scenes" / f"{scene.split}-{scene.seed}.png")
    names = " ; ".join(dict.fromkeys(obj.name for obj in scene.objects))
    truth = {"caption en": scene.captions["caption"]} | {q.prompt: q.answers for q in scene.questions[:2]}
    prompts = [*truth, f"detect {names}", f"segment {names}"]
    *answers, boxes, masks = minivlm.generate(model, processor, image, prompts, max_new_tokens=DEFAULT_NEW_TOKENS)
    lines = []
    for (prompt, accepted), answer in zip(truth.items(), answers, strict=True):
        is_correct = answer in accepted or emoji.same_caption(answer, accepted[0])
        lines.append(f"{prompt}: {answer or '(nothing)'}" + ("" if is_correct else f"  (truth: {accepted[0]})"))
        print(f"  {lines[-1]}")
    print(f"  {prompts[-2]}: {len(scene.objects)} to find")
    detected = print_boxes(boxes, image.size, vqvae, indent="    ")
    segmented = print_masks(prompts[-1], masks, image.size, vqvae)
    return image, segmented or detected, lines


def print_masks(prompt: str, answer: str, size: tuple[int, int], vqvae) -> list[tuple]:
    """Prints the sizes of an answer's masks in one line and returns the detections that have a mask, with the mask."""
    from minivlm.course.viz.boxes import area

    found = [(d, mask) for d, mask in with_masks(find_boxes(answer, size), size, vqvae) if mask is not None]
    print(f"  {prompt}: " + ("; ".join(f"{d.label or '(no name)'}, {area(mask)}" for d, mask in found) or "(nothing)"))
    return found


# --- evaluate, train, finetune, doctor -----------------------------------------------------------------------------


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    data = "measure on your own examples instead of scenes: a file or folder, as for finetune"
    parser.add_argument("--data", metavar="DATA", help=data)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the images of DATA, if not beside it")
    parser.add_argument("--scenes", type=int, default=1000, metavar="N", help="scenes per split; default: 1000")
    parser.add_argument("--split", nargs="+", metavar="S", help="some of them; default: all")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also save the results to this file")
    parser.add_argument("--objects", type=int, metavar="N", help="how many different ones occur; default: all 100")
    parser.add_argument("--most-objects", type=int, metavar="N", help="in one scene; default: 4")


def run_evaluate(args: argparse.Namespace) -> None:
    from minivlm import emoji
    from minivlm.emoji import evaluation

    if args.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, not {args.scenes}.")
    for split in args.split or ():
        if args.data is None and split not in evaluation.SPLITS:
            raise ValueError(f"There is no split {split!r}, only {', '.join(evaluation.SPLITS)}.")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"There is no folder {str(args.json.parent)!r} for {args.json.name}: create it first.")
    check_output(args.json)
    if args.data is not None:
        return evaluate_data(args)
    sizes = {"size": args.objects, "most": args.most_objects}
    world = emoji.World(**{name: value for name, value in sizes.items() if value is not None})
    model, processor, folder = load(args)
    splits = tuple(args.split or evaluation.SPLITS)
    evaluation.run(model, processor, args.scenes, splits, args.json, load_vqvae(folder), world)


def evaluate_data(args: argparse.Namespace) -> None:
    """``evaluate --data``: the metrics of a model on its user's own examples."""
    from minivlm.training import finetune
    from minivlm.training.examples import read_examples

    splits = read_examples(args.data, args.images)
    if args.split:
        if missing := [split for split in args.split if split not in splits]:
            raise ValueError(f"{args.data} has no split {missing[0]!r}, only {', '.join(splits)}.")
        splits = {split: splits[split] for split in args.split}
    model, processor, _ = load(args)
    finetune.report(model, processor, splits, args.json)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    from minivlm.emoji import recipe

    recipe.add_arguments(parser)


def run_train(args: argparse.Namespace) -> None:
    from minivlm.emoji import recipe

    recipe.run(args)


def add_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    from minivlm.training import finetune

    finetune.add_arguments(parser)


def run_finetune(args: argparse.Namespace) -> None:
    from minivlm.training import finetune

    finetune.run(args)


def add_families_arguments(parser: argparse.ArgumentParser) -> None:
    from minivlm.families import evaluation

    evaluation.add_arguments(parser)


def run_families(args: argparse.Namespace) -> None:
    from minivlm.families import evaluation

    evaluation.run(args)


def run_doctor(args: argparse.Namespace) -> None:
    from minivlm import doctor

    print(doctor.report())


# --- lab ------------------------------------------------------------------------------------------------------------


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    work = Path("work")
    parser.add_argument("--work", type=Path, default=work, metavar="W", help=f"folder of your copy; default: {work}")
    parser.add_argument("--copy", action="store_true", help="copy the notebooks and open nothing, for another editor")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="after --: options of JupyterLab")


def run_lab(args: argparse.Namespace) -> None:
    """Copies the notebooks to the learner's own folder and opens JupyterLab there."""
    from minivlm.course import lab

    for sentence in lab.copy_notebooks(args.work):
        note(sentence)
    if args.copy:
        print(f"Your notebooks are in {args.work}: begin with {args.work / lab.FIRST}.")
    else:
        lab.open_lab(args.work, args.options)


# --- grade ---------------------------------------------------------------------------------------------------------


def add_grade_arguments(parser: argparse.ArgumentParser) -> None:
    folder = "folder with NAME.ipynb files, or with one folder per student; with --merge, with the results of shards"
    parser.add_argument("submissions", type=Path, help=folder)
    out = Path("grades.csv")
    parser.add_argument("--out", type=Path, default=out, metavar="OUT.csv", help=f"file for the grades; default: {out}")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="seed of the random cases; default: 1234")
    limit = "seconds per notebook; a cell or an exercise can take up to a quarter of it; default: 120"
    parser.add_argument("--time-limit", type=float, default=120.0, metavar="S", help=limit)
    parser.add_argument("--chapter", metavar="NN", help="grade only this chapter, such as 05; default: all submitted")
    due = "list notebooks that changed later, such as 2026-09-30T23:59; the time is local unless it has a zone"
    parser.add_argument("--due", type=datetime.fromisoformat, metavar="TIME", help=due)
    layout = "layout of the grades that Moodle or Canvas imports; default: a column per exercise"
    parser.add_argument("--csv", choices=("moodle", "canvas"), default="", help=layout)
    parts = parser.add_mutually_exclusive_group()
    shard = "grade only every N-th student from the I-th on, and write OUT.I-of-N.json for --merge"
    parts.add_argument("--shard", metavar="I/N", help=shard)
    parts.add_argument("--merge", action="store_true", help="grade nothing: put together the results of all shards")


def run_grade(args: argparse.Namespace) -> None:
    from minivlm.course.grading import grader
    from minivlm.course.grading.shards import Shard

    shard = Shard.parse(args.shard) if args.shard else None
    if args.merge:
        grader.merge(args.submissions, args.out, args.csv)
    else:
        seed, limit, chapter = args.seed, args.time_limit, args.chapter
        grader.grade(args.submissions, args.out, seed, limit, chapter, args.due, shard, args.csv)
    if shard:
        note(f"Wrote {shard.path(args.out)}. When all {shard.count} are in one folder, grade that folder with --merge.")
        return
    note(f"Wrote {args.out}, and {grader.messages_path(args.out)} with the reason for every lost point.")
    note(f"Open {grader.pages_path(args.out) / 'index.html'} for the class. Next to it is a page for each student.")


# --- capstone ------------------------------------------------------------------------------------------------------


def add_capstone_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.py", help="your own PaliGemma")
    parser.add_argument("--start", action="store_true", help="write FILE.py, with the functions to fill in, and stop")
    page = "page to write when all steps have passed; default: beside FILE.py, with .html at the end"
    parser.add_argument("--out", type=Path, metavar="OUT.html", help=page)
    limit = "seconds that one call of a function in FILE.py can take; default: 60"
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help=limit)


def run_capstone(args: argparse.Namespace) -> None:
    """Checks the learner's own file. Exit code 1 if a step is wrong."""
    from minivlm.course import capstone

    if args.start:
        capstone.start(args.file)
        print(f"Wrote {args.file}. Fill in its functions in any order, and check them with")
        print(f"  python -m minivlm capstone {args.file}")
        return
    out = args.out or args.file.with_suffix(".html")
    check_output(out)
    show = lambda step: print(capstone.for_console(str(step)), flush=True)  # noqa: E731
    report = capstone.check(args.file, out, args.time_limit, args.debug, show)
    print(report.summary)
    if report.certificate:
        note(f"Wrote {report.certificate}.")
    if report.first_wrong:
        sys.exit(1)


COMMANDS = {
    "demo": ("show what the embedded checkpoint can do", add_demo_arguments, run_demo),
    "generate": ("answer prompts about an image", add_generate_arguments, run_generate),
    "evaluate": ("measure a checkpoint on held-out scenes", add_evaluate_arguments, run_evaluate),
    "train": ("train a small PaliGemma from scratch", add_train_arguments, run_train),
    "finetune": ("fine-tune a checkpoint on your own images", add_finetune_arguments, run_finetune),
    "families": ("train and measure the other families of models", add_families_arguments, run_families),
    "lab": ("open your own copy of the notebooks in JupyterLab", add_lab_arguments, run_lab),
    "grade": ("grade a folder of notebooks, with one row per student", add_grade_arguments, run_grade),
    "capstone": (
        "check your own PaliGemma, written from an empty file, in twelve steps",
        add_capstone_arguments,
        run_capstone,
    ),
    "doctor": ("report what is installed and which checkpoints fit into memory", lambda parser: None, run_doctor),
}

if __name__ == "__main__":
    sys.exit(main())
