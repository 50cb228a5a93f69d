# %% [markdown]
# # L7 · Does it look?
#
# **Does the model look at the image, or guess from the question?**
#
# | | |
# |---|---|
# | know first | chapter 08: the whole model; chapter 05: what a mask allows |
# | you will build | POPE's numbers and its hardest negatives, occlusion, contrastive decoding |
# | runs on | CPU, nothing to download |

# %%
import tempfile

import numpy as np
import torch

import minivlm
from minivlm import emoji
from minivlm.course import exercises, looking, viz
from minivlm.emoji.batches import patch_coverage

# %% [markdown]
# ## Predict first
#
# 1. Half of a set of yes/no questions have the answer *yes*. A model that never looks at its image answers them. What
#    is its accuracy?
# 2. Text may not attend to the image in one of the four decoder layers. In which layer does that hurt most?
# 3. Attention weights are largest on some patch. Hide that patch. Does the answer change?
# 4. A model sees two new things, a *dax* and a *wug*, always together or both absent. Then it sees one of them alone.
#    What does it say about the other?
#
# <details><summary>Answers, to open at the end of the lab</summary>
#
# 1. 50%, whatever it says. So 50 is the zero of this scale.
# 2. It differs from one training run to the next, so it has to be measured. What one layer cannot read, another often
#    can. Several together hurt badly.
# 3. Often not. The patch with the most weight is frequently not the one that the answer depends on.
# 4. That it is there, nearly always. Nothing that it saw tells the two apart.
#
# </details>

# %% [markdown]
# ## A toy: six questions
#
# POPE (arXiv:2305.10355) asks "is there a …?" about things that are in the image and things that are not, as many of
# each. Five numbers follow from the answers. By hand, for six questions:

# %%
said = torch.tensor([True, True, True, True, False, False])
truth = torch.tensor([True, True, False, False, True, False])
hits = yeses = positives = agree = 0
for s, t in zip(said.tolist(), truth.tolist(), strict=True):
    hits += s and t
    yeses += s
    positives += t
    agree += s == t
print(f"accuracy {agree}/6, precision {hits}/{yeses}, recall {hits}/{positives}, says yes {yeses}/6")
assert (agree, hits, yeses, positives) == (3, 2, 4, 3)

# %% [markdown]
# Of the four times it said yes, two were right: **precision** 2/4. Of the three things that were there, it found two:
# **recall** 2/3. **F1** is their harmonic mean, 2·p·r / (p + r). The fifth number is how often it says **yes**. A model
# that hallucinates says yes too often, and its precision falls.
#
# ## Exercise L7.1 · POPE's numbers
#
# `said` and `truth` are booleans `[N]`. Return a dictionary of five floats from 0 to 1: `accuracy`, `precision`,
# `recall`, `f1`, `yes`. A fraction whose denominator is 0 is 0, for a model that never says yes.


# %%
def yes_no_metrics(said, truth):
    """Two boolean tensors [N] → a dictionary of five floats."""
    ### BEGIN SOLUTION
    hits = float((said & truth).sum())
    precision = hits / max(float(said.sum()), 1.0)
    recall = hits / max(float(truth.sum()), 1.0)
    return {
        "accuracy": float((said == truth).float().mean()),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes": float(said.float().mean()),
    }
    ### END SOLUTION


# %%
exercises.check(yes_no_metrics)
### BEGIN HIDDEN TESTS
exercises.score(yes_no_metrics, points=2, seed=1)
### END HIDDEN TESTS

# %%
yes_no_metrics = exercises.piece("yes_no_metrics")
toy = yes_no_metrics(said, truth)
assert np.isclose(toy["precision"], 2 / 4) and np.isclose(toy["recall"], 2 / 3) and np.isclose(toy["f1"], 4 / 7)

# %% [markdown]
# ## Which absent thing to ask about
#
# POPE chooses the absent things in three ways: at **random**; the most **popular** of the data set; or **adversarially**,
# those that most often occur together with what this image shows. If a model guesses from habit, a knife beside a fork is
# the hardest. A slow loop over four scenes and five names:

# %%
toy_names = ["fork", "knife", "plate", "dog", "ball"]
toy_present = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
slow = []
for row in toy_present.tolist():
    scores = []
    for candidate in range(5):
        together = [sum(bool(s[candidate] and s[n]) for s in toy_present) for n in range(5) if row[n]]
        scores.append(-1 if row[candidate] else sum(together))
    slow.append(scores.index(max(scores)))
    print([toy_names[n] for n in range(5) if row[n]], "→", toy_names[slow[-1]], scores)

# %% [markdown]
# ## Exercise L7.2 · Adversarial negatives
#
# `present` is boolean `[N, M]`: which of M names each of N scenes shows. The co-occurrence of two names is the number of
# scenes that show both. For each scene, a name's score is its co-occurrence with the names present, summed. Return the
# `count` absent names with the largest scores, `[N, count]` indices, largest first. Of names with equal scores, the first
# comes first (`stable=True`).


# %%
def adversarial_negatives(present, count):
    """Boolean [N, M] and a number → indices [N, count]."""
    ### BEGIN SOLUTION
    shown = present.long()
    scores = (shown @ (shown.T @ shown)).masked_fill(present, -1)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    ### END SOLUTION


# %%
exercises.check(adversarial_negatives)
### BEGIN HIDDEN TESTS
exercises.score(adversarial_negatives, points=3, seed=1)
### END HIDDEN TESTS

# %%
adversarial_negatives = exercises.piece("adversarial_negatives")
assert adversarial_negatives(toy_present, 1)[:, 0].tolist() == slow

# %% [markdown]
# Now the embedded model. For each held-out scene we ask about one object that is there and one that is not. Only the
# first token of the answer matters, so one forward pass is enough: is the logit of `yes` above that of `no`?

# %%
model = minivlm.PaliGemma.from_pretrained(dtype=torch.float32)
processor = minivlm.Processor.from_pretrained()
scenes = [emoji.make_scene(seed, "validation") for seed in range(100)]
images = [s.image for s in scenes]
names = list(emoji.OBJECTS)


def names_present(scenes):
    """Booleans [N, M]: which of the names each scene shows."""
    return torch.tensor([[name in {o.name for o in s.objects} for name in names] for s in scenes])


def ask(images, indices):
    """For each image, how far "yes" is above "no" when asked about one name."""
    questions = [looking.is_there(names[i]) for i in indices]
    return looking.yes_margin(looking.next_logits(model, processor, images, questions), processor)


# %%
present = names_present(scenes)
there = torch.tensor([names.index(s.objects[0].name) for s in scenes])
absent = {
    "random": looking.random_negatives(present, 1, torch.Generator().manual_seed(0))[:, 0],
    "popular": looking.popular_negatives(present, 1)[:, 0],
    "adversarial": adversarial_negatives(present, 1)[:, 0],
}
truth = torch.tensor([True] * len(scenes) + [False] * len(scenes))


def show(name, numbers):
    print(f"{name:20}", "   ".join(f"{key} {100 * value:5.1f}" for key, value in numbers.items()))


margins_there = ask(images, there)
for name, indices in absent.items():
    assert not present.gather(1, indices[:, None]).any()  # they really are absent
    numbers = yes_no_metrics(torch.cat([margins_there, ask(images, indices)]) > 0, truth)
    show(name, numbers)
    assert numbers["accuracy"] > 0.8

# %% [markdown]
# Models of photos lose accuracy from row to row. Ours has no reason to: its training scenes combine objects nearly at
# random, so there is no habit to fall back on. Hard negatives are hard only for a model whose *data* had habits. We come
# back to that at the end, and build such a model.
#
# ## Blank, shuffled, other
#
# Accuracy alone does not prove that it looks. Take the image away: a gray square, the same patches in another order, or the
# image of another scene. The questions and the right answers stay.


# %%
def shuffle_patches(image, seed, side=16):
    """The patches of an image in random order."""
    n = len(image) // side
    patches = image.reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)
    patches = patches[np.random.default_rng(seed).permutation(n * n)]
    return patches.reshape(n, n, side, side, 3).swapaxes(1, 2).reshape(image.shape)


gray = np.full_like(images[0], looking.BLANK)
versions = {
    "own image": images,
    "blank": [gray] * len(images),
    "shuffled patches": [shuffle_patches(image, seed) for seed, image in enumerate(images)],
    "another scene": images[1:] + images[:1],
}
viz.image_row([v[0] for v in versions.values()], list(versions))

# %%
asked = torch.cat([there, absent["random"]])
by_version = {name: yes_no_metrics(ask(v * 2, asked) > 0, truth) for name, v in versions.items()}
for name, numbers in by_version.items():
    show(name, numbers)
assert by_version["own image"]["accuracy"] > by_version["blank"]["accuracy"] + 0.25
assert by_version["own image"]["accuracy"] > by_version["another scene"]["accuracy"] + 0.25
assert abs(by_version["blank"]["accuracy"] - 0.5) < 0.15

# %% [markdown]
# So it looks: without its image it is at chance. Compare the row of the shuffled patches with both. Whether something is
# there is mostly a question about single patches, and a shuffled patch still shows what it shows.
#
# ## Which part of the image? Occlusion
#
# Hide one patch and see how far the answer moves. This is a cause and its effect: nothing but the patch has changed.
#
# ## Exercise L7.3 · Occlude every patch
#
# `pixels` is `[C, H, W]`. Return `[P, C, H, W]`: P copies, and in copy p, patch p in reading order has the value `fill` in
# all channels. The image need not be square. Leave `pixels` as it is.


# %%
def occlude_patches(pixels, patch_size, fill=0.0):
    """[C, H, W] and the side of a patch → [P, C, H, W]."""
    ### BEGIN SOLUTION
    _, height, width = pixels.shape
    columns = width // patch_size
    copies = pixels.repeat(height // patch_size * columns, 1, 1, 1)
    for p in range(len(copies)):
        y, x = p // columns * patch_size, p % columns * patch_size
        copies[p, :, y : y + patch_size, x : x + patch_size] = fill
    return copies
    ### END SOLUTION


# %%
exercises.check(occlude_patches)
### BEGIN HIDDEN TESTS
exercises.score(occlude_patches, points=2, seed=1)
### END HIDDEN TESTS

# %%
occlude_patches = exercises.piece("occlude_patches")
side = 16
P = processor.num_image_tokens


def margins(pixels, prompt):
    """How far "yes" is above "no" for each of some preprocessed images."""
    return looking.yes_margin(looking.logits_of_pixels(model, processor, pixels, prompt), processor)


def two_maps(scene):
    """Question, pixels, occlusion map [P], and the attention of the last token to the patches, layer by layer [L, P]."""
    prompt = looking.is_there(scene.objects[0].name)
    pixels = processor.preprocess_images([scene.image])[0]
    drop = margins(pixels[None], prompt) - margins(occlude_patches(pixels, side), prompt)
    batch = processor(text=[prompt], images=[scene.image])
    attention = torch.stack([w[0, :, -1, :P].mean(0) for w in viz.decoder_attention(model, **batch)])
    return prompt, pixels, drop, attention


# %%
distinct = [s for s in scenes if len(s.objects) > 1 and len({o.name for o in s.objects}) == len(s.objects)][:16]
maps = [two_maps(s) for s in distinct]
prompt, _, drop, attention = maps[0]
panels = torch.cat([drop.clamp(min=0)[None], attention])
titles = ["occlusion", *(f"attention, layer {i}" for i in range(len(attention)))]
viz.attention_on_image(distinct[0].image, panels, titles, title=prompt)

# %% [markdown]
# ## Which one tells the truth?
#
# Two tests. Is the strongest patch on the object that was asked about? And if we hide the k strongest patches, does the
# answer turn to no? A map that tells the truth needs few patches for that.

# %%
counts = [0, 1, 2, 4, 8, 16]
rng = np.random.default_rng(0)
orders = {name: [] for name in [*titles, "random patches"]}
for _, _, drop, attention in maps:
    for name, values in zip(titles, [drop, *attention], strict=True):
        orders[name].append(values.argsort(descending=True).tolist())
    orders["random patches"].append(rng.permutation(P).tolist())

on_object, still_yes = {}, {}
for name, order in orders.items():
    shares = [patch_coverage(s, side)[0][o[0]] > 0.1 for s, o in zip(distinct, order, strict=True)]
    rows = []
    for (prompt, pixels, _, _), o in zip(maps, order, strict=True):
        hidden = torch.stack([looking.occlude(pixels, o[:k], side) for k in counts])
        rows.append(margins(hidden, prompt) > 0)
    on_object[name], still_yes[name] = np.mean(shares), torch.stack(rows).float().mean(0).tolist()
    print(f"{name:20} strongest patch on the object: {on_object[name]:4.0%}")
viz.lines(
    {name: (counts, values) for name, values in still_yes.items()},
    "Hiding the strongest patches",
    "patches hidden",
    'share of answers that are still "yes"',
)

# %%
four = counts.index(4)
assert on_object["occlusion"] > on_object["random patches"] + 0.2
assert still_yes["occlusion"][four] < still_yes["random patches"][four] - 0.2
print(f"after {counts[four]} patches:", {name: round(v[four], 2) for name, v in still_yes.items()})

# %% [markdown]
# Occlusion tells the truth, by construction and in this test. Attention weights say where a head read, in one layer, at one
# position. What matters may have been read earlier, by another token, or not used at all. Treat attention maps as a hint
# (arXiv:1902.10186), and test them as we did here.
#
# ## Blocking attention from text to image
#
# Another cause and its effect: in some layers no text token may attend to the image. In which layers is the object's name
# fetched? We caption scenes with one object. A toy mask first, with P = 2 patches and three text tokens:

# %%
toy_mask = torch.ones(1, 5, 5, dtype=torch.bool)
slow = toy_mask.clone()
for query in range(5):
    for key in range(5):
        if query >= 2 and key < 2:
            slow[0, query, key] = False
assert torch.equal(looking.block_image(toy_mask, 2), slow) and toy_mask.all()
viz.attention_mask(slow[0], ["<image>", "<image>", "<bos>", "caption", "en"])

# %%
world = emoji.World(100, most=1)
singles = [emoji.make_scene(seed, "validation", world=world) for seed in range(40)]
right = [emoji.with_article(s.objects[0].name) for s in singles]


def named(layers):
    """The share of one-object scenes whose caption is right when these layers are blocked."""
    with looking.blocked(model, layers, P):
        answers = minivlm.generate(
            model, processor, [s.image for s in singles], "caption en", max_new_tokens=4, cache=None
        )
    return np.mean([a == r for a, r in zip(answers, right, strict=True)])


L = len(model.language_model.model.layers)
by_layers = {layers: named(layers) for layers in [(), *((i,) for i in range(L)), (L - 2, L - 1), tuple(range(L))]}
for layers, share in by_layers.items():
    print(f"blocked in {str(list(layers)):14} {share:4.0%} named")
assert by_layers[()] > 0.7 and by_layers[tuple(range(L))] < 0.2

# %% [markdown]
# Blocked everywhere, the model is blind and repeats what is frequent. Compare the last two layers together with each of
# them alone: where both can read the name, blocking one proves little. So think twice before you say "the name is fetched
# in layer …".
#
# ## The logit lens over image tokens
#
# The output head turns the last hidden state into words. Nothing keeps us from applying it earlier, and to the *image*
# tokens: what would a patch say after 0, 1, … decoder layers?

# %%
batch = processor(text=["caption en"] * len(singles), images=[s.image for s in singles])
lens = looking.logit_lens(model, **batch)[:, :, :P]  # [layers + 1, scenes, P, V]
top = lens.argmax(-1)
on = torch.from_numpy(np.stack([patch_coverage(s, side)[0] >= 0.5 for s in singles]))


def first_tokens(name):
    """How a word for the object can begin."""
    return {processor.encode([form])[0][0] for form in (name, f" {name}", f" {emoji.plural(name)}")}


shares = []
for layer in range(L + 1):
    hits = [
        int(token) in first_tokens(s.objects[0].name)
        for s, row, inside in zip(singles, top[layer], on, strict=True)
        for token in row[inside]
    ]
    shares.append(np.mean(hits))
print(f"{len(hits)} patches on objects; named:", [f"{share:.0%}" for share in shares])
assert max(shares) > 0.3
viz.lines(
    {"patches on the object": (list(range(L + 1)), shares)}, "Logit lens", "layers", "named, share of the patches"
)

# %%
words = [processor.decode([int(t)]).strip() or "·" for t in top[L - 1, 0]]
viz.nearest_words(singles[0].image, words, title=f"What each patch would say before the last layer ({right[0]})")

# %% [markdown]
# The patches name the object before the decoder has done anything: training aligned the projector's output with the
# decoder's own words. In models trained otherwise the lens finds less than is there (arXiv:2602.00462).
#
# ## Contrastive decoding
#
# VCD (arXiv:2311.16922) asks twice, once with the image and once with one that says nothing, and subtracts what the question
# alone suggests: (1 + α) · logits − α · blind. A token that is implausible with the image is cut first, or the
# difference of two small numbers could win. *Implausible* means less than β times the most likely token.
#
# ## Exercise L7.4 · Contrastive logits
#
# `logits` and `blind` are `[N, V]`. Return (1 + α) · logits − α · blind, with −inf wherever the probability under `logits` is
# below β times the largest probability of its row.


# %%
def contrastive_logits(logits, blind, alpha, beta):
    """Twice [N, V] and two numbers → [N, V]."""
    ### BEGIN SOLUTION
    p = logits.softmax(-1)
    mixed = (1 + alpha) * logits - alpha * blind
    return mixed.masked_fill(p < beta * p.amax(-1, keepdim=True), -torch.inf)
    ### END SOLUTION


# %%
exercises.check(contrastive_logits)
### BEGIN HIDDEN TESTS
exercises.score(contrastive_logits, points=2, seed=1)
### END HIDDEN TESTS

# %%
contrastive_logits = exercises.piece("contrastive_logits")
known = (scenes, asked)
strange = [emoji.make_scene(seed, "artist") for seed in range(100)]  # an artist that training never showed
there_too = torch.tensor([names.index(s.objects[0].name) for s in strange])
absent_too = looking.random_negatives(names_present(strange), 1, torch.Generator().manual_seed(0))[:, 0]
for who, (some, indices) in {"known": known, "unseen": (strange, torch.cat([there_too, absent_too]))}.items():
    prompts, shown = [looking.is_there(names[i]) for i in indices], [s.image for s in some] * 2
    seen = looking.next_logits(model, processor, shown, prompts)
    blind = looking.next_logits(model, processor, [gray] * len(shown), prompts)
    for alpha in (0.0, 1.0, 2.0):
        contrast = contrastive_logits(seen, blind, alpha, beta=1e-6)
        numbers = yes_no_metrics(looking.yes_margin(contrast, processor) > 0, truth)
        show(f"{who}, alpha {alpha:g}", numbers)
        assert numbers["accuracy"] > 0.6

# %% [markdown]
# The row *blank* further up shows which way the model leans without its image. Contrast moves its answers the other way:
# if it leans toward no, recall rises and precision falls. On an artist it does not know, that can help; on those it
# knows, there is little to win and something to lose. And it always costs a second forward pass for every token. It does
# not make the model see more. It moves the threshold of what it says, much as a bias on `yes` would.
#
# ### Break it: without the cut
#
# Predict first: β = 0 and a large α, for the first token of a caption. Which token wins?

# %%
few = [s.image for s in singles]
seen = looking.next_logits(model, processor, few, ["caption en"] * len(few))
blind = looking.next_logits(model, processor, [gray] * len(few), ["caption en"] * len(few))
for beta in (0.1, 0.0):
    contrast = contrastive_logits(seen, blind, 20.0, beta)
    p = seen.softmax(-1).gather(1, contrast.argmax(-1, keepdim=True))[:, 0]
    words = [processor.decode([int(t)]) for t in contrast.argmax(-1)[:6]]
    print(f"beta {beta}: {words}, lowest probability of a chosen token {float(p.min()):.1e}")
    assert beta == 0.0 or (p >= beta * seen.softmax(-1).amax(-1) - 1e-6).all()

# %% [markdown]
# With β = 0, tokens win that nobody would say here, only because the gray image makes them *even less* likely. The cut
# repairs it: what is left was plausible to begin with.
#
# ## Size and overlap
#
# Does it see small things, and things that touch others? Objects of 150 scenes by the unseen artist: how many of them does
# the caption name?

# %%
many = [emoji.make_scene(1000 + seed, "artist") for seed in range(150)]
captions = minivlm.generate(model, processor, [s.image for s in many], "caption en", max_new_tokens=32)
table = []
for s, caption in zip(many, captions, strict=True):
    mentioned = emoji.parse_caption(caption) or {}
    for o in s.objects:
        x0, y0, x1, y1 = o.box
        others = [other.box for other in s.objects if other is not o]
        touches = any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in others)
        table.append((int(o.mask.sum()), touches, o.name in mentioned))
area, touches, found = map(np.array, zip(*table, strict=True))
quarters = np.array_split(area.argsort(), 4)
print(f"{len(area)} objects")
print("smallest to largest quarter:", [f"{area[q].mean():.0f} px: {found[q].mean():.0%}" for q in quarters])
for flag, name in ((False, "boxes apart"), (True, "boxes overlap")):
    share = found[touches == flag]
    print(f"{name}: {share.mean():.0%} of {len(share)} ± {196 * share.std() / len(share) ** 0.5:.0f} points")
assert found.mean() > 0.4 and touches.any() and not touches.all()

# %% [markdown]
# Look at the interval before you believe a difference. A few hundred objects tell apart ten points, not three.
#
# ## A world that is too regular
#
# Now a model with a habit. We teach the embedded model two words that it has never seen, *dax* (really an avocado) and
# *wug* (a sunflower), with questions "is there a dax?" and "is there a wug?". In the first world the two always occur
# together or not at all. In the second they also occur alone. Same model, same steps, same number of scenes.

# %%
pair, small = ("avocado", "sunflower"), emoji.World(10, most=3)


def learn(kinds, steps=80):
    """A copy of the model that has learned both words from 200 scenes of these kinds."""
    student = minivlm.PaliGemma.from_pretrained(dtype=torch.float32)
    lessons = looking.new_word_scenes(pair, small, kinds, 200 // len(kinds))
    with tempfile.TemporaryDirectory() as folder:
        looking.teach_words(student, processor, lessons, folder, steps=steps)
    return student.eval()


test = looking.new_word_scenes(pair, small, ("both", "neither", "first", "second"), 25, "validation")
shown = torch.tensor([s for _, s in test])  # [100, 2]


def says_yes(student):
    """[100, 2]: what it says about each word."""
    columns = []
    for word in looking.WORDS:
        questions = [looking.is_there(word)] * len(test)
        logits = looking.next_logits(student, processor, [s.image for s, _ in test], questions)
        columns.append(looking.yes_margin(logits, processor) > 0)
    return torch.stack(columns, dim=1)


# %%
claims = {}
for world_name, kinds in {
    "always together": ("both", "neither"),
    "also alone": ("both", "neither", "first", "second"),
}.items():
    yes = says_yes(learn(kinds))
    one_missing = shown.sum(1) == 1
    as_trained = float((yes == shown)[~one_missing].float().mean())
    claims[world_name] = float(yes[one_missing][~shown[one_missing]].float().mean())
    print(f"{world_name}: both or neither right {as_trained:.0%}; claims the missing one {claims[world_name]:.0%}")
    assert as_trained > 0.75
assert claims["always together"] > 0.5 and claims["also alone"] < claims["always together"] - 0.15

# %% [markdown]
# On scenes like those it was trained on, the first model is right. It looks, too: it says no when neither is there. But
# it claims what is missing, because nothing in its data ever told the two apart. More steps would not help, and neither
# would a better decoder. Only other data does. This is what adversarial negatives measure, and where POPE's numbers for
# models of photos come from: forks lie beside knives.
#
# ## It matches
#
# Our hidden states, read by the lens, against those of transformers, with its own norm and head:

# %%
import transformers

from minivlm import hub

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = hub.EMBEDDED
theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
batch = processor(text=["caption en"], images=[singles[0].image])
lens = looking.logit_lens(model, **batch)
with torch.no_grad():
    out = theirs(**batch, output_hidden_states=True)
    decoder = theirs.model.language_model
    reference = [theirs.lm_head(decoder.norm(x)) for x in out.hidden_states[:-1]] + [out.logits]
largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(lens, reference, strict=True))
print(f"logit lens: largest relative difference to transformers {largest:.1e}")
assert len(reference) == L + 1 and largest < 1e-5

# %% [markdown]
# ## Recap
#
# * Accuracy means little without the accuracy on a blank image. On balanced yes/no questions, 50% is blind.
# * Occlusion and blocked attention change one thing and measure the effect. Attention maps and the logit lens only read.
# * Contrastive decoding subtracts what the question alone suggests. It costs a second pass, and precision.
# * What always occurs together in the data cannot be told apart by the model, however well it looks.
#
# **Three questions**
#
# <details><summary>1. A model has 85% on random negatives and 70% on adversarial ones. What do you look at next?</summary>
#
# How often it says yes in both, and its accuracy on blank images. If it says yes more often to adversarial ones, it guesses
# from what else is there.
#
# </details>
#
# <details><summary>2. Blocking layer 2 changes nothing. Is the image not read in layer 2?</summary>
#
# It may be. Other layers can read the same, so one blocked layer proves little. Block several together, or block all
# but one.
#
# </details>
#
# <details><summary>3. Why is the gray square a better blank image than noise?</summary>
#
# Both are images that the model has never seen. What counts is that it finds no object there. Check it: ask about
# absent and present things, and accuracy must be 50%.
#
# </details>
#
# ## Open problem: the smallest set of patches
#
# Hiding the strongest patches one by one ignores that two patches can replace each other. Write `fewest(pixels, prompt)`: as few
# patches as possible whose occlusion turns `margins(…)` below 0. On `maps[:5]` it has to need fewer patches in total than the
# order of the occlusion map does. There is no stub.
#
# <details><summary>A pointer</summary>
#
# Hide the best patch, then measure *all* others again: a greedy search with P passes per step. Removing a patch that
# turned out not to be needed can help at the end.
#
# </details>

# %%
if fewest := globals().get("fewest"):
    used = baseline = 0
    for prompt, pixels, drop, _ in maps[:5]:
        if margins(pixels[None], prompt)[0] <= 0:
            continue
        chosen, order = set(fewest(pixels, prompt)), drop.argsort(descending=True).tolist()
        assert margins(looking.occlude(pixels, chosen, side)[None], prompt)[0] < 0, "the answer is still yes"
        hidden = torch.stack([looking.occlude(pixels, order[:k], side) for k in range(P + 1)])
        used, baseline = used + len(chosen), baseline + int((margins(hidden, prompt) < 0).long().argmax())
    print(f"{used} patches, the order of the map needs {baseline}")
    assert used < baseline
else:
    print("fewest is not written yet.")

# %% [markdown]
# **Back to** [08 · Full PaliGemma inference](../08_inference.ipynb).
