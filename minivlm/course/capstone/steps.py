"""The twelve steps of the capstone. Each asks the learner's functions, and raises what is wrong."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import minivlm
from minivlm import emoji, hub
from minivlm.config import PaliGemmaConfig
from minivlm.course.capstone import mistakes
from minivlm.course.capstone.examine import Different, Question, examine
from minivlm.course.capstone.process import Failed, Kept, Learner
from minivlm.course.capstone.reference import (
    SPARSE,
    Checkpoint,
    Judge,
    Reference,
    arguments,
    config_values,
    random_batch,
    save_small,
    until_end,
    with_end,
)
from minivlm.course.exercises.calling import Case
from minivlm.course.exercises.comparing import compare

SMALL = "a small PaliGemma with random weights"
SMALL2 = "a small PaliGemma 2 with random weights"
EMBEDDED = "the embedded checkpoint"
NEW_TOKENS = 12  # of the greedy answers of small checkpoints
ROUNDS = 3  # of the measurement of speed
SCENES = (("validation", 0), ("validation", 1), ("pairs", 0), ("artist", 0))  # split and seed; the demo shows them too
LONGEST = 96  # tokens of an answer about a scene


@dataclass
class Speed:
    """Tokens per second of one system, the median of several rounds in turns with the others."""

    name: str
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)


@dataclass
class Answered:
    """A scene, and the learner's answers about it."""

    split: str
    seed: int
    image: Any
    prompts: list[str]
    answers: list[str]
    accepted: list[str]


class Bench:
    """All that the steps share: the learner's file, checkpoints in a temporary folder, and what was measured."""

    def __init__(self, learner: Learner, folder: Path):
        self.learner, self.folder = learner, folder
        self.loaded: dict[Path, Kept] = {}
        self.speeds: list[Speed] = []
        self.answered: list[Answered] = []

    @cached_property
    def small(self) -> Checkpoint:
        return save_small(self.folder / "small", 1, SMALL)

    @cached_property
    def small2(self) -> Checkpoint:
        return save_small(self.folder / "small2", 2, SMALL2)

    @cached_property
    def embedded(self) -> Checkpoint:
        model = minivlm.PaliGemma.from_pretrained().requires_grad_(False)
        return Checkpoint(EMBEDDED, hub.resolve(None), model)

    @cached_property
    def processor(self) -> minivlm.Processor:
        return minivlm.Processor.from_pretrained()

    @cached_property
    def scenes(self) -> list[emoji.Scene]:
        return [emoji.make_scene(seed, split) for split, seed in SCENES]

    def load(self, folder: Path) -> Kept:
        """The learner's model of a checkpoint, loaded once."""
        if folder not in self.loaded:
            self.loaded[folder] = self.learner.call("load", str(folder))
        return self.loaded[folder]

    def ask(self, checkpoint: Checkpoint, name: str) -> Callable:
        """The learner's function of this name, with its model already passed."""
        model = self.load(checkpoint.folder)
        return lambda *inputs: self.learner.call(name, model, *inputs)

    def examine(self, question: Question) -> None:
        examine(question, self.learner)

    def prepare(self, image: Any, prompt: str) -> tuple[np.ndarray, ...]:
        """Image and prompt for the embedded checkpoint, as arrays."""
        batch = self.processor([prompt], [image], padding_side="left")
        return arguments({name: value.numpy() for name, value in batch.items() if name != "labels"})


# --- 1 config -------------------------------------------------------------------------------------------------------


def check_config(bench: Bench) -> str:
    """The numbers of five configurations, three of them as sparse as on the hub."""
    files = {f"{name}, as sparse as on the hub": values for name, values in SPARSE.items()}
    files |= {c.name: read(c.folder / "config.json") for c in (bench.embedded, bench.small)}
    for number, (name, values) in enumerate(files.items()):
        folder = bench.folder / f"config{number}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        got = bench.learner.call("read_config", str(folder))
        check_values(name, got, values)
    return f"{len(files)} files"


def check_values(name: str, got: Any, values: dict) -> None:
    for path, want in config_values(PaliGemmaConfig.from_dict(values)).items():
        found, in_file = dig(got, path), dig(values, path) is not None
        if is_same(found, want):
            continue
        what = "is missing" if found is None else f"is {found!r}"
        why = "" if in_file else "The file does not have this name, so a default or another name applies."
        raise Different(f"`{path}` {what}, expected {want!r}, in config.json of {name}.", *filter(None, [why]))


def dig(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def is_same(found: Any, want: Any) -> bool:
    if isinstance(want, list) or isinstance(found, list):
        as_set = lambda value: set(value if isinstance(value, list) else [value])  # noqa: E731
        return as_set(found) == as_set(want)
    if isinstance(want, Real) and isinstance(found, Real) and not isinstance(found, bool):
        return math.isclose(found, want, rel_tol=1e-9)
    return found == want


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- 2, 3 tower and projector ---------------------------------------------------------------------------------------


def check_tower(bench: Bench) -> str:
    small, rng = bench.small, np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (2, 3, 12, 12)).astype(np.float32)
    bench.examine(ask_tower(bench, small, [Case((pixels,), "two images"), Case((pixels[:1],), "one image")]))
    return f"2 batches on {SMALL}"


def ask_tower(bench: Bench, checkpoint: Checkpoint, cases: list[Case]) -> Question:
    right = Reference(checkpoint.model)
    known, inside = partial(mistakes.of_tower, checkpoint.model), partial(right.inner, "encode_image")
    ask = bench.ask(checkpoint, "encode_image")
    return Question(f"on {checkpoint.name}", ask, right.encode_image, cases, known, inside)


def check_projector(bench: Bench) -> str:
    small, rng = bench.small, np.random.default_rng(2)
    features = rng.normal(0, 1, (2, 9, 24)).astype(np.float32)
    right, known = Reference(small.model), partial(mistakes.of_projector, small.model)
    bench.examine(Question(f"on {small.name}", bench.ask(small, "project"), right.project, [Case((features,))], known))
    return f"on {SMALL}"


# --- 4 masks --------------------------------------------------------------------------------------------------------


def check_masks(bench: Bench) -> str:
    config, cases = bench.small.config, []
    for prompts, answers, side, name in (
        ([4], [0], "right", "a prompt alone"),
        ([3, 3], [5, 5], "right", "prompt and answer"),
        ([5, 2, 3], [4, 3, 0], "right", "padding on the right"),
        ([5, 2, 3], [4, 3, 0], "left", "padding on the left"),
    ):
        batch = random_batch(config, prompts, answers, side)
        cases.append(Case((batch["attention_mask"], batch["token_type_ids"]), name))

    def hidden(function: Callable) -> Callable:
        """The function without the rows of padding queries."""

        def run(attention_mask, token_type_ids):
            mask = function(attention_mask, token_type_ids)
            fits = mask.ndim == 3 and mask.shape[:2] == attention_mask.shape and mask.dtype == bool
            return mask & np.asarray(attention_mask, bool)[:, :, None] if fits else mask

        return run

    ask, answer = hidden(partial(bench.learner.call, "prefix_lm_mask")), hidden(Reference.prefix_lm_mask)
    known = partial(mistakes.from_exercises, mistakes.MASK)
    bench.examine(Question("in `prefix_lm_mask`", ask, answer, cases, known))
    return f"{len(cases)} kinds of batches"


# --- 5 decoder ------------------------------------------------------------------------------------------------------


def check_decoder(bench: Bench) -> str:
    bench.examine(ask_decoder(bench, bench.small))
    return f"2 batches on {SMALL}"


def ask_decoder(bench: Bench, checkpoint: Checkpoint) -> Question:
    right, rng, cases = Reference(checkpoint.model), np.random.default_rng(3), []
    for prompts, answers, name in (([6, 6], [0, 0], "a prompt alone"), ([4], [9], "prompt and answer")):
        batch = random_batch(checkpoint.config, prompts, answers)
        embeddings = rng.normal(0, 1, (*batch["input_ids"].shape, checkpoint.config.projection_dim))
        masks = (batch["attention_mask"], batch["token_type_ids"])
        cases.append(Case((embeddings.astype(np.float32), *masks), name))
    known, inside = partial(mistakes.of_decoder, checkpoint.model), partial(right.inner, "decode")
    ask = bench.ask(checkpoint, "decode")
    return Question(f"on {checkpoint.name}", ask, right.decode, cases, known, inside)


# --- 6 loading ------------------------------------------------------------------------------------------------------


def check_loading(bench: Bench) -> str:
    """The three layouts of names, shards and bfloat16 are read; files that do not fit are refused."""
    small = bench.small
    weights = {name: weight.detach().clone() for name, weight in small.model.state_dict().items()}
    saved5 = {name.replace("vision_tower.vision_model.", "vision_tower."): w for name, w in weights.items()}
    memory5 = {f"model.{name.replace('language_model.model.', 'language_model.')}": w for name, w in saved5.items()}
    memory5["lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    for number, (what, tensors, shards) in enumerate(
        (
            ("names as saved by transformers 5", saved5, 1),
            ("names as in the memory of transformers 5, and a stored lm_head", memory5, 1),
            ("two shards", weights, 2),
            ("weights in bfloat16", half, 1),
        )
    ):
        folder = write(bench.folder / f"layout{number}", small, tensors, shards)
        check_loaded(bench, Checkpoint(f"a checkpoint with {what}", folder, rounded(small, tensors)))
    lost = "language_model.model.layers.1.mlp.up_proj.weight"
    extra = {"language_model.model.layers.0.pre_feedforward_layernorm.weight": torch.zeros(32)}
    turned = {lost: weights[lost].T.contiguous()}
    for number, (what, tensors) in enumerate(
        (
            (f"without {lost}", {name: w for name, w in weights.items() if name != lost}),
            (f"with one weight too many, {next(iter(extra))}", weights | extra),
            (f"in which {lost} is transposed", weights | turned),
        )
    ):
        folder = write(bench.folder / f"damaged{number}", small, tensors, 1)
        check_refused(bench, folder, what)
    return "4 layouts are read, 3 damaged files are refused"


def write(folder: Path, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    if shards == 1:
        save_file({name: w.contiguous() for name, w in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def rounded(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> minivlm.PaliGemma:
    """The model, with weights rounded to bfloat16 if the stored ones are."""
    if next(iter(tensors.values())).dtype == torch.float32:
        return checkpoint.model
    model = minivlm.PaliGemma(checkpoint.config).eval().requires_grad_(False)
    model.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    return model


def check_loaded(bench: Bench, checkpoint: Checkpoint) -> None:
    """Tower and decoder must give the same results from this file as from the first one."""
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 12, 12)).astype(np.float32)
    for question in (ask_tower(bench, checkpoint, [Case((pixels,))]), ask_decoder(bench, checkpoint)):
        for case in question.cases:
            if problem := compare(question.ask(*case.arguments), question.answer(*case.arguments)):
                raise Different(f"the model from {checkpoint.name} is another one: {problem}", *advice(checkpoint))


def advice(checkpoint: Checkpoint) -> list[str]:
    if "bfloat16" in checkpoint.name:
        return ["A bfloat16 is the upper half of a float32. Convert the weights, and compute in float32."]
    return []


def check_refused(bench: Bench, folder: Path, what: str) -> None:
    try:
        bench.learner.call("load", str(folder))
    except Failed:
        if bench.learner.is_lost:
            raise
        return
    hint = "Compare the names and shapes in the file with those that your model needs, and raise ValueError."
    raise Different(f"`load` reads a checkpoint {what} without an error, so it would answer nonsense.", hint)


# --- 7 logits -------------------------------------------------------------------------------------------------------


def check_logits(bench: Bench) -> str:
    small, embedded = bench.small, bench.embedded
    batch = random_batch(small.config, [5, 5], [4, 4])
    bench.examine(ask_logits(bench, small, [Case(arguments(batch))]))
    scenes = [Case(bench.prepare(scene.image, "caption en"), "a scene") for scene in bench.scenes[:2]]
    bench.examine(ask_logits(bench, embedded, scenes))
    worst = max(
        compare_with_transformers(bench, small, [Case(arguments(batch))]),
        compare_with_transformers(bench, embedded, scenes),
    )
    return f"within {worst:.1e} of transformers, relative to the largest"


def ask_logits(bench: Bench, checkpoint: Checkpoint, cases: list[Case]) -> Question:
    """Padding is not looked at."""

    def real(function: Callable) -> Callable:
        def logits(input_ids, pixel_values, attention_mask, token_type_ids):
            scores = function(input_ids, pixel_values, attention_mask, token_type_ids)
            fits = scores.ndim == 3 and scores.shape[:2] == attention_mask.shape
            return np.where(np.asarray(attention_mask, bool)[..., None], scores, 0) if fits else scores

        return logits

    right = Reference(checkpoint.model)
    known = partial(mistakes.of_whole, checkpoint.model)
    ask = real(bench.ask(checkpoint, "logits"))
    return Question(f"on {checkpoint.name}", ask, real(right.logits), cases, known)


def compare_with_transformers(bench: Bench, checkpoint: Checkpoint, cases: list[Case]) -> float:
    """The largest relative difference to transformers. Raises ``Different`` above 1e-5."""
    judge, worst = Judge(checkpoint.folder), 0.0
    for case in cases:
        got, want = bench.ask(checkpoint, "logits")(*case.arguments), judge.logits(*case.arguments)
        is_token = case.arguments[2].astype(bool)
        if problem := compare(got[is_token], want[is_token]):
            raise Different(f"the logits on {checkpoint.name} are not those of transformers: {problem}")
        worst = max(worst, float(np.abs(got - want)[is_token].max() / np.abs(want[is_token]).max()))
    return worst


# --- 8 cache --------------------------------------------------------------------------------------------------------


def check_cache(bench: Bench) -> str:
    check_steps(bench, bench.small)
    return f"{NEW_TOKENS} steps on {SMALL}"


def check_steps(bench: Bench, checkpoint: Checkpoint) -> None:
    """The scores after a prompt, and after each token of an answer that is given, not generated."""
    learner, model = bench.learner, bench.load(checkpoint.folder)
    right = Reference(checkpoint.model)
    rng, cases = np.random.default_rng(4), []
    for prompts in ([5], [3, 3]):
        batch = random_batch(checkpoint.config, prompts, [0] * len(prompts), seed=5)
        answer = rng.integers(3, 110, (len(prompts), NEW_TOKENS))
        cases.append(Case((*arguments(batch), answer), "two rows" if len(prompts) == 2 else "one row"))

    def ask(input_ids, pixel_values, attention_mask, token_type_ids, answer):
        answer = np.asarray(answer)
        scores, cache = learner.call(
            "prefill", model, input_ids, pixel_values, attention_mask, token_type_ids, answer.shape[1]
        )
        columns = [scores]
        for token in answer.T:
            scores, cache = learner.call("step", model, cache, np.ascontiguousarray(token))
            columns.append(scores)
        if len({column.shape for column in columns}) > 1:
            raise Failed(f"`prefill` returns scores of shape {list(columns[0].shape)}, `step` {list(scores.shape)}.")
        return np.stack(columns, 1)

    for case in cases:  # if the prompt's scores are wrong, those of the steps say nothing
        got, want = ask(*case.arguments), right.steps(*case.arguments)
        if got.shape == want.shape and (problem := compare(got[:, 0], want[:, 0])):
            what = "`prefill` returns other scores than the right ones for the token after the prompt"
            raise Different(f"{what}: {problem}", "`logits` is right: take its last position.")
    where = f"on {checkpoint.name}, with the prompt first (position 0 of axis 1) and then a token at a time"
    bench.examine(Question(where, ask, right.steps, cases, partial(mistakes.of_cache, right)))


# --- 9, 10 generation -----------------------------------------------------------------------------------------------


def check_greedy(bench: Bench) -> str:
    small = bench.small
    batch, end = find_end(small, [6], "right")
    for number, eos in enumerate((end, [1, end], 1)):
        checkpoint = with_end(small, bench.folder / f"ends{number}", eos)
        check_answers(bench, checkpoint, [arguments(batch)], NEW_TOKENS)
    scenes = [bench.prepare(scene.image, "caption en") for scene in bench.scenes[:2]]
    check_answers(bench, bench.embedded, scenes, LONGEST)
    return "3 prompts, token for token, and captions of 2 scenes"


def find_end(checkpoint: Checkpoint, prompts: list[int], side: str) -> tuple[dict[str, np.ndarray], int]:
    """A batch, and a token that ends its first row early if it is the end token: other tokens would follow.

    With several rows, some of the others go on.
    """
    with mistakes.setting([checkpoint.config], "eos_token_id", 0):  # which it does not say
        for seed in range(1000):
            batch = random_batch(checkpoint.config, prompts, [0] * len(prompts), side, seed)
            first, *others = Reference(checkpoint.model).generate(*arguments(batch), NEW_TOKENS)
            for place, token in enumerate(first[:-3]):
                rest = set(first[place + 1 :]) - {token, 1}
                if place > 2 and token > 1 and token not in first[:place] and len(rest) > 1:
                    if not others or any(token not in row[: place + 2] for row in others):
                        return batch, token
    raise ValueError("The answers of the small model are too uniform to show where they end.")


def check_answers(bench: Bench, checkpoint: Checkpoint, batches: list[tuple[np.ndarray, ...]], longest: int) -> None:
    """The learner's ``generate`` must give the same tokens as the right one."""
    ends, ask = checkpoint.config.eos_token_ids, bench.ask(checkpoint, "generate")
    right = Reference(checkpoint.model)
    for batch in batches:
        want, got = right.generate(*batch, longest), ask(*batch, longest)
        check_rows(got, want, ends, longest, f"on {checkpoint.name}")


def check_rows(got: list[list[int]], want: list[list[int]], ends: list[int], longest: int, where: str) -> None:
    if len(got) != len(want):
        raise Different(f"`generate` returns {len(got)} rows for {len(want)} prompts, {where}.")
    for row, (mine, right) in enumerate(zip(got, want, strict=True)):
        which = f"row {row} of {len(want)}" if len(want) > 1 else "the answer"
        cut = until_end(mine, ends)
        if rest := [token for token in mine[len(cut) + 1 :] if token not in (0, *ends)]:
            raise Different(
                f"{which} goes on after an end token, {mine[len(cut)]}, {where}.",
                f"config.json says that {' or '.join(map(str, ends))} ends an answer. What follows is {rest[:5]}.",
            )
        if len(mine) > longest:
            raise Different(f"{which} has {len(mine)} tokens, {where}, although max_new_tokens is {longest}.")
        if cut == right:
            continue
        same = next((i for i, (a, b) in enumerate(zip(cut, right, strict=False)) if a != b), min(len(cut), len(right)))
        if same == len(cut):
            message = f"{which} ends after {len(cut)} tokens, expected {len(right)}, {where}."
            hint = f"Only {' or '.join(map(str, ends))} ends an answer, or the maximum of {longest} tokens."
        elif same == len(right):
            message, hint = f"{which} has {len(cut)} tokens, expected {len(right)}, {where}.", "Check when it ends."
        else:
            message = f"token {same} of {which} is {cut[same]}, expected {right[same]}, {where}."
            hint = f"The tokens before it are right: {right[:same][-5:]}." if same else "It is the first token."
        raise Different(message, *shifted(cut, right), hint)


def shifted(got: list[int], want: list[int]) -> list[str]:
    """How a wrong answer is related to the right one."""
    if len(want) > 2 and got[: len(want) - 1] == want[1:]:
        return ["The answer is right from its second token on: the first one, which the prompt predicts, is lost."]
    if len(want) > 2 and got[1 : len(want)] == want[:-1]:
        return ["The answer comes one token too late: is the prompt's last token repeated?"]
    return []


def check_batch(bench: Bench) -> str:
    """Three prompts of different lengths together: every row as if it were alone."""
    small = bench.small
    sides = [("left", "padding on the left"), ("right", "padding on the right")]
    cases = [Case(arguments(random_batch(small.config, [7, 2, 4], [3, 5, 0], s, seed=7)), n) for s, n in sides]
    question = ask_logits(bench, small, cases)
    known = partial(mistakes.from_exercises, mistakes.PADDING)
    bench.examine(Question(question.where, question.ask, question.answer, cases, known))
    check_padded_answers(bench, small)
    return "every row as if it were alone"


def check_padded_answers(bench: Bench, original: Checkpoint) -> None:
    """Three rows, padded on the left, which end at different times."""
    batch, end = find_end(original, [7, 2, 4], "left")
    checkpoint = with_end(original, original.folder.with_name(f"{original.folder.name}-ends"), end)
    right, ends = Reference(checkpoint.model), checkpoint.config.eos_token_ids
    want = right.generate(*arguments(batch), NEW_TOKENS)
    got = bench.ask(checkpoint, "generate")(*arguments(batch), NEW_TOKENS)
    try:
        check_rows(got, want, ends, NEW_TOKENS, f"on {checkpoint.name}")
    except Different as difference:
        message, *notes = difference.args
        unmasked = batch | {"attention_mask": np.ones_like(batch["attention_mask"])}
        if [until_end(row, ends) for row in got] == right.generate(*arguments(unmasked), NEW_TOKENS):
            notes.insert(0, "It answers as if there were no padding: is `attention_mask` used?")
        raise Different(message, *notes) from None


# --- 11 PaliGemma 2 -------------------------------------------------------------------------------------------------


def check_paligemma2(bench: Bench) -> str:
    small2 = bench.small2
    bench.examine(ask_decoder(bench, small2))
    batch = random_batch(small2.config, [5, 5], [8, 8], seed=9)
    bench.examine(ask_logits(bench, small2, [Case(arguments(batch))]))
    worst = compare_with_transformers(bench, small2, [Case(arguments(batch))])
    check_steps(bench, small2)
    check_padded_answers(bench, small2)
    return f"decoder, logits (within {worst:.1e} of transformers), cache and a padded batch on {SMALL2}"


# --- 12 speed -------------------------------------------------------------------------------------------------------


def check_speed(bench: Bench) -> str:
    """The same answers as transformers, and the time that each of the three systems takes for them."""
    embedded, ends = bench.embedded, bench.embedded.config.eos_token_ids
    ask = bench.ask(embedded, "generate")
    judge = Judge(embedded.folder)
    jobs = []
    for scene in bench.scenes:
        names = " ; ".join(dict.fromkeys(obj.name for obj in scene.objects))
        jobs += [(scene, prompt, bench.prepare(scene.image, prompt)) for prompt in ("caption en", f"detect {names}")]
    answers = []
    for _, _, inputs in jobs:
        want, got = judge.generate(*inputs, LONGEST), ask(*inputs, LONGEST)
        check_rows(got, want, ends, LONGEST, f"on {EMBEDDED}, where transformers is the judge")
        answers.append(until_end(got[0], ends))
    bench.answered = [
        Answered(s.split, s.seed, s.image, [jobs[i][1] for i in (k, k + 1)], texts(bench, answers, k), accepted(s))
        for k, s in zip(range(0, len(jobs), 2), bench.scenes, strict=True)
    ]
    bench.speeds = [Speed(bench.learner.path.name), Speed("minivlm"), Speed("transformers")]
    count = sum(min(len(answer) + 1, LONGEST) for answer in answers)  # the end token is generated too
    with one_thread():
        for _ in range(ROUNDS):
            for speed, seconds in zip(bench.speeds, measure(bench, judge, ask, jobs), strict=True):
                speed.rates.append(count / seconds)
    rates = ", ".join(f"{speed.name} {speed.rate:,.0f}" for speed in bench.speeds)
    return f"tokens per second on one thread: {rates}"


def texts(bench: Bench, answers: list[list[int]], first: int) -> list[str]:
    return [bench.processor.decode(answer) for answer in answers[first : first + 2]]


def accepted(scene: emoji.Scene) -> list[str]:
    return list(scene.captions["caption"])


def measure(bench: Bench, judge: Judge, ask: Callable, jobs: list[tuple]) -> list[float]:
    """The seconds that the learner, minivlm and transformers take for all answers."""
    right, totals = Reference(bench.embedded.model), [0.0, 0.0, 0.0]
    for _, _, inputs in jobs:
        ask(*inputs, LONGEST)
        totals[0] += bench.learner.seconds
        for number, system in ((1, right), (2, judge)):
            start = time.perf_counter()
            system.generate(*inputs, LONGEST)
            totals[number] += time.perf_counter() - start
    return totals


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


STEPS: tuple[tuple[str, Callable[[Bench], str]], ...] = (
    ("config", check_config),
    ("tower", check_tower),
    ("projector", check_projector),
    ("masks", check_masks),
    ("decoder", check_decoder),
    ("loading", check_loading),
    ("logits", check_logits),
    ("cache", check_cache),
    ("greedy", check_greedy),
    ("batch", check_batch),
    ("PaliGemma 2", check_paligemma2),
    ("speed", check_speed),
)
