"""vqvae.py: equal to an independent implementation of the same layers, and safe with any broken file."""

import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from minivlm import emoji, locations, vqvae
from minivlm.hub import EMBEDDED
from minivlm.locations import Detection, crop_mask, paste_mask
from minivlm.vqvae import MaskVQVAE, code_grid, find_npz

# Every array of a file, written by hand: what big_vision's decoder reads from vae-oid.npz, and the encoder.
SHAPES = {
    "encoder.0.weight": (16, 1, 4, 4),
    "encoder.0.bias": (16,),
    "encoder.2.weight": (32, 16, 4, 4),
    "encoder.2.bias": (32,),
    "encoder.4.weight": (64, 32, 4, 4),
    "encoder.4.bias": (64,),
    "encoder.6.weight": (128, 64, 4, 4),
    "encoder.6.bias": (128,),
    "encoder.8.net.0.weight": (128, 128, 3, 3),
    "encoder.8.net.0.bias": (128,),
    "encoder.8.net.2.weight": (128, 128, 3, 3),
    "encoder.8.net.2.bias": (128,),
    "encoder.8.net.4.weight": (128, 128, 1, 1),
    "encoder.8.net.4.bias": (128,),
    "encoder.9.net.0.weight": (128, 128, 3, 3),
    "encoder.9.net.0.bias": (128,),
    "encoder.9.net.2.weight": (128, 128, 3, 3),
    "encoder.9.net.2.bias": (128,),
    "encoder.9.net.4.weight": (128, 128, 1, 1),
    "encoder.9.net.4.bias": (128,),
    "encoder.10.weight": (512, 128, 1, 1),
    "encoder.10.bias": (512,),
    "_vq_vae._embedding": (128, 512),
    "decoder.0.weight": (128, 512, 1, 1),
    "decoder.0.bias": (128,),
    "decoder.2.net.0.weight": (128, 128, 3, 3),
    "decoder.2.net.0.bias": (128,),
    "decoder.2.net.2.weight": (128, 128, 3, 3),
    "decoder.2.net.2.bias": (128,),
    "decoder.2.net.4.weight": (128, 128, 1, 1),
    "decoder.2.net.4.bias": (128,),
    "decoder.3.net.0.weight": (128, 128, 3, 3),
    "decoder.3.net.0.bias": (128,),
    "decoder.3.net.2.weight": (128, 128, 3, 3),
    "decoder.3.net.2.bias": (128,),
    "decoder.3.net.4.weight": (128, 128, 1, 1),
    "decoder.3.net.4.bias": (128,),
    "decoder.4.weight": (128, 128, 4, 4),  # transposed convolution: in, out, height, width
    "decoder.4.bias": (128,),
    "decoder.6.weight": (128, 64, 4, 4),
    "decoder.6.bias": (64,),
    "decoder.8.weight": (64, 32, 4, 4),
    "decoder.8.bias": (32,),
    "decoder.10.weight": (32, 16, 4, 4),
    "decoder.10.bias": (16,),
    "decoder.12.weight": (1, 16, 1, 1),
    "decoder.12.bias": (1,),
}


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights that keep the magnitude of activations about the same from layer to layer."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in SHAPES.items():
        inputs = shape[0] if name.startswith("decoder") and shape[2:] == (4, 4) else int(np.prod(shape[1:]))
        scale = 0.1 if len(shape) == 1 else 1.0 if "embedding" in name else (2 / inputs) ** 0.5
        arrays[name] = (scale * rng.normal(size=shape)).astype(np.float32)
    return arrays


def write(path: Path, arrays: dict) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return random_arrays()


@pytest.fixture(scope="module")
def vae(arrays, tmp_path_factory) -> MaskVQVAE:
    return MaskVQVAE.from_pretrained(write(tmp_path_factory.mktemp("vae") / "vae-random.npz", arrays))


@pytest.fixture(scope="module")
def local(arrays, tmp_path_factory) -> MaskVQVAE:
    """The same without its residual blocks, whose receptive field covers most of a 4 × 4 grid: they add zero."""
    silent = {name: np.zeros_like(array) if ".net.4." in name else array for name, array in arrays.items()}
    return MaskVQVAE.from_pretrained(write(tmp_path_factory.mktemp("vae") / "vae-local.npz", silent))


@pytest.fixture(scope="module")
def embedded() -> MaskVQVAE:
    return MaskVQVAE.from_pretrained()


# --- reference implementation -----------------------------------------------------------------------------------------


class Reference:
    """The architecture of the released file in torch functions, straight from the named arrays."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def weights(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.arrays[f"{name}.weight"], self.arrays[f"{name}.bias"]

    def residual(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = F.relu(F.conv2d(x, *self.weights(f"{name}.net.0"), padding=1))
        y = F.relu(F.conv2d(y, *self.weights(f"{name}.net.2"), padding=1))
        return x + F.conv2d(y, *self.weights(f"{name}.net.4"))

    def grid(self, masks: torch.Tensor) -> torch.Tensor:
        x = 2 * (masks.unsqueeze(1) - 0.5)
        for number in (0, 2, 4, 6):
            x = F.relu(F.conv2d(x, *self.weights(f"encoder.{number}"), stride=2, padding=1))
        for number in (8, 9):
            x = self.residual(x, f"encoder.{number}")
        return F.conv2d(x, *self.weights("encoder.10"))

    def codes(self, masks: torch.Tensor) -> torch.Tensor:
        grid, codebook = self.grid(masks), self.arrays["_vq_vae._embedding"]
        codes = torch.zeros(len(masks), 16, dtype=torch.long)
        for row in range(4):
            for column in range(4):
                for i in range(len(masks)):
                    distances = ((grid[i, :, row, column] - codebook) ** 2).sum(1)
                    codes[i, 4 * row + column] = distances.argmin()
        return codes

    def masks(self, codes: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(len(codes), 512, 4, 4)
        for row in range(4):
            for column in range(4):
                x[:, :, row, column] = self.arrays["_vq_vae._embedding"][codes[:, 4 * row + column]]
        x = F.relu(F.conv2d(x, *self.weights("decoder.0")))
        for number in (2, 3):
            x = self.residual(x, f"decoder.{number}")
        for number in (4, 6, 8, 10):
            x = F.relu(F.conv_transpose2d(x, *self.weights(f"decoder.{number}"), stride=2, padding=1))
        return F.conv2d(x, *self.weights("decoder.12"))[:, 0]


def test_names_and_shapes():
    assert {name: tuple(value.shape) for name, value in MaskVQVAE().state_dict().items()} == SHAPES


@torch.no_grad()
def test_encoder_and_decoder_equal_the_reference(vae, arrays):
    reference, g = Reference(arrays), torch.Generator().manual_seed(0)
    masks = torch.rand(3, 64, 64, generator=g)
    assert relative_error(vae.encoder(2 * masks[:, None] - 1), reference.grid(masks)) < 1e-5
    codes = vae.encode(masks)
    assert torch.equal(codes, reference.codes(masks)) and len(codes.unique()) > 5
    codes = torch.randint(0, 128, (3, 16), generator=g)
    assert relative_error(vae.decode(codes), reference.masks(codes)) < 1e-5


@torch.no_grad()
def test_embedded_weights_equal_the_reference(embedded):
    with np.load(EMBEDDED / "vae-emoji.npz", allow_pickle=False) as file:
        reference = Reference({name: file[name].astype(np.float32) for name in file.files})
    masks = torch.stack([torch.tensor(crop) for crop, *_ in held_out(6)])
    codes = embedded.encode(masks)
    assert relative_error(embedded.encoder(2 * masks[:, None] - 1), reference.grid(masks)) < 1e-5
    assert torch.equal(codes, reference.codes(masks))
    assert relative_error(embedded.decode(codes), reference.masks(codes)) < 1e-5


def test_codes_are_the_nearest_vectors(vae):
    g = torch.Generator().manual_seed(1)
    vectors = torch.randn(2, 512, 4, 4, generator=g) + 3 * vae._vq_vae._embedding.mean(0)[:, None, None]
    distances = torch.cdist(vectors.double().flatten(2).mT, vae._vq_vae._embedding.double())
    assert torch.equal(vae._vq_vae.nearest(vectors), distances.argmin(2))
    codes = torch.randint(0, 128, (5, 16), generator=g)
    assert torch.equal(vae._vq_vae.nearest(code_grid(codes, vae._vq_vae._embedding)), codes)


# --- which code is which cell -------------------------------------------------------------------------------------


def cells(change: torch.Tensor) -> torch.Tensor:
    """[64, 64] → the sum in each of the 4 × 4 cells, row by row."""
    return change.unflatten(1, (4, 16)).unflatten(0, (4, 16)).sum((1, 3)).flatten()


def test_grid_is_filled_row_by_row():
    codebook = torch.arange(128.0)[:, None] * torch.tensor([1.0, -1.0])
    grid = code_grid(torch.arange(16)[None] + 100, codebook)
    assert grid.shape == (1, 2, 4, 4)
    assert grid[0, 0].tolist() == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [108, 109, 110, 111],
        [112, 113, 114, 115],
    ]
    assert torch.equal(grid[0, 1], -grid[0, 0])


@pytest.mark.parametrize("weights", ["local", "embedded"])
@torch.no_grad()
def test_a_code_changes_its_own_cell_most(weights, request):
    """Code k of 16 changes the decoded mask at row k // 4, column k % 4, not at row k % 4."""
    vae, g = request.getfixturevalue(weights), torch.Generator().manual_seed(0)
    before = torch.randint(0, 128, (8, 16), generator=g)
    drawn = vae.decode(before)
    for k in range(16):
        after = before.clone()
        after[:, k] = (after[:, k] + torch.randint(1, 128, (8,), generator=g)) % 128
        assert int(cells((vae.decode(after) - drawn).abs().mean(0)).argmax()) == k


@torch.no_grad()
def test_a_cell_changes_its_own_vector_most(local):
    masks = torch.zeros(16, 64, 64)
    for k in range(16):
        row, column = 16 * (k // 4), 16 * (k % 4)
        masks[k, row : row + 16, column : column + 16] = 1
    change = local.encoder(2 * masks[:, None] - 1) - local.encoder(torch.full((1, 1, 64, 64), -1.0))
    assert torch.equal(change.norm(dim=1).flatten(1).argmax(1), torch.arange(16))


def test_codes_out_of_range():
    vae = MaskVQVAE()
    for wrong in (128, -1, 1023):
        with pytest.raises(ValueError, match=f"from 0 to 127, not from {min(0, wrong)} to {max(0, wrong)}"):
            vae.decode(torch.tensor([[wrong, *[0] * 15]]))
    assert vae.decode(torch.zeros(0, 16, dtype=torch.long)).shape == (0, 64, 64)


# --- masks of images ------------------------------------------------------------------------------------------------


def held_out(count: int) -> list[tuple]:
    """(cropped mask, mask of the whole image, box) of objects in held-out scenes."""
    objects = [obj for seed in range(count) for obj in emoji.make_scene(seed, "validation").objects]
    return [(crop_mask(obj.mask, obj.box), obj.mask, obj.box) for obj in objects]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def round_trip(vae: MaskVQVAE, objects: list[tuple]) -> float:
    """Mean IoU of masks with their reconstructions, in the whole image."""
    _, masks, boxes = zip(*objects, strict=True)
    codes = vae.codes_from_masks(masks, boxes)
    assert all(len(row) == 16 and all(type(code) is int and 0 <= code < 128 for code in row) for row in codes)
    drawn = vae.masks_from_detections(
        [Detection("x", box, row) for box, row in zip(boxes, codes, strict=True)], 112, 112
    )
    return float(np.mean([iou(mask, back) for mask, back in zip(masks, drawn, strict=True)]))


def test_masks_of_held_out_objects_are_reconstructed(embedded):
    objects = held_out(60)
    mean = round_trip(embedded, objects)
    filled = np.mean([mask.sum() / ((x1 - x0) * (y1 - y0)) for _, mask, (x0, y0, x1, y1) in objects])
    assert mean >= 0.88 and filled < 0.7  # filling each whole box would not be enough


def test_codes_and_masks_are_those_of_crop_and_paste(vae):
    masks, boxes = zip(*[(mask, box) for _, mask, box in held_out(3)], strict=True)
    crops = torch.from_numpy(np.stack([crop_mask(mask, box) for mask, box in zip(masks, boxes, strict=True)]))
    codes = vae.codes_from_masks(masks, boxes)
    assert codes == [tuple(row) for row in vae.encode(crops).tolist()]
    coded = [Detection("a", box, row) for box, row in zip(boxes, codes, strict=True)]
    found = [Detection("b", (1, 2, 3, 4)), *coded, Detection("c", (5, 5, 9, 9))]
    first, *between, last = vae.masks_from_detections(found, 112, 100)
    assert first is None and last is None
    values = vae.decode(torch.tensor(codes)).detach().numpy()
    for mask, value, box in zip(between, values, boxes, strict=True):
        assert np.array_equal(mask, paste_mask(value, box, 112, 100))
    assert (
        vae.codes_from_masks([], []) == []
        and vae.masks_from_detections([], 5, 5) == []
        and vae.masks_from_detections(found[:1], 5, 5) == [None]
    )


# --- files ----------------------------------------------------------------------------------------------------------


def test_saving_loses_only_float16_precision(vae, embedded, tmp_path):
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "vae-emoji.npz").stat().st_size < 4_500_000
    again = MaskVQVAE.from_pretrained(tmp_path)
    assert not again.training
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32 and relative_error(value, vae.state_dict()[name]) < 2**-11
    embedded.save_pretrained(tmp_path, "vae-again.npz")  # a second float16 round trip is exact
    again = MaskVQVAE.from_pretrained(tmp_path / "vae-again.npz")
    assert all(torch.equal(value, embedded.state_dict()[name]) for name, value in again.state_dict().items())


def test_float16_and_float32_files_agree(vae, arrays, tmp_path):
    path = write(tmp_path / "half.npz", {name: array.astype(np.float16) for name, array in arrays.items()})
    half, codes = MaskVQVAE.from_pretrained(path), torch.arange(16)[None]
    with torch.no_grad():
        assert 0 < relative_error(half.decode(codes), vae.decode(codes)) < 5e-3
    exact = MaskVQVAE.from_pretrained(write(tmp_path / "d.npz", {n: a.astype(np.float64) for n, a in arrays.items()}))
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in exact.state_dict().items())


def test_arrays_that_only_training_needs_are_skipped(vae, arrays, tmp_path):
    more = {"_vq_vae._ema_w": np.ones((128, 512)), "_vq_vae._ema_cluster_size": np.array([object()])}  # not even read
    loaded = MaskVQVAE.from_pretrained(write(tmp_path / "vae-oid.npz", arrays | more))
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_one_error_lists_everything_wrong_with_the_arrays(arrays, tmp_path):
    changed = {name: array for name, array in arrays.items() if name != "decoder.0.bias"}
    changed["decoder.2.bias"] = np.zeros(3, np.float32)
    changed["decoder.4.weight"] = np.zeros((128, 128, 3, 3), np.float32)
    changed["encoder.10.bias"] = np.zeros((), np.float32)
    changed["_vq_vae._embedding"] = np.zeros((128, 512), np.int64)
    changed["encoder.0.bias"] = np.array(["a"] * 16)
    with pytest.raises(ValueError) as caught:
        MaskVQVAE.from_pretrained(write(tmp_path / "other.npz", changed))
    message = str(caught.value)
    for part in (
        "other.npz is not PaliGemma's mask VQ-VAE",
        "decoder.0.bias is missing",
        "decoder.2.bias is unexpected",
        "decoder.4.weight has shape (128, 128, 3, 3) instead of (128, 128, 4, 4)",
        "encoder.10.bias has shape () instead of (512,)",
        "_vq_vae._embedding has dtype int64",
        "encoder.0.bias has dtype <U1",
    ):
        assert part in message
    assert message.count(";") == 5


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "boom")


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def replaced(arrays: dict, name: str, content: bytes) -> bytes:
    """A .npz file in which one entry has other content."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for key, array in arrays.items():
            file.writestr(f"{key}.npy", content if key == name else npy(array))
    return whole.getvalue()


def bad_files(folder: Path, arrays: dict) -> dict[str, bytes]:
    """Name → content of files that must be refused."""
    whole = io.BytesIO()
    np.savez_compressed(whole, **arrays)
    plain = npy(arrays["_vq_vae._embedding"])
    bombs, objects = Bomb(folder / "boom"), io.BytesIO()
    np.savez(objects, **arrays | {"encoder.0.bias": np.array([bombs] * 16, dtype=object)})
    damaged = bytearray(whole.getvalue())
    damaged[len(damaged) // 2] ^= 1
    return {
        "pickled objects in place of numbers": objects.getvalue(),
        "a pickle": pickle.dumps(bombs),
        "truncated": whole.getvalue()[:-1000],
        "cut in half": whole.getvalue()[: len(whole.getvalue()) // 2],
        "one bit damaged": bytes(damaged),
        "empty": b"",
        "no zip": b"hello " * 100,
        "a single array": plain,
        "half a header": replaced(arrays, "encoder.0.bias", npy(arrays["encoder.0.bias"]).replace(b"}", b" ", 1)),
        "a header of another version": replaced(arrays, "encoder.0.bias", b"\x93NUMPY\x02\x00" + b"\xff" * 500),
        "an array longer than its header says": replaced(
            arrays, "encoder.0.bias", npy(arrays["encoder.0.bias"]) + b"0"
        ),
        "an array shorter than its header says": replaced(arrays, "encoder.0.bias", npy(arrays["encoder.0.bias"])[:-1]),
    }


def test_bad_files_are_refused_and_never_unpickled(arrays, tmp_path):
    for name, content in bad_files(tmp_path, arrays).items():
        path = tmp_path / "vae-broken.npz"
        path.write_bytes(content)
        message = "has dtype object" if "objects" in name else "is not a complete .npz file of plain arrays"
        with pytest.raises(ValueError, match=f"vae-broken.npz .*{message}") as caught:
            MaskVQVAE.from_pretrained(path)
        assert "\n" not in str(caught.value), name
        assert not (tmp_path / "boom").exists(), name
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()  # the bomb works


def test_other_zip_files_are_refused_before_they_are_read(arrays, tmp_path):
    """Nothing is decompressed whose name, shape and dtype are not as expected."""
    path = tmp_path / "vae-odd.npz"
    header = npy(np.zeros((0,), np.float32)).replace(b"(0,)", b"(99999999999999999,)")[:128]
    huge = b"\0" * 50_000_000
    for content, message in (
        (replaced({"README.txt": huge[:9]}, "", b""), "README.txt is unexpected"),
        (replaced(arrays | {"bomb": 0}, "bomb", huge), "bomb is unexpected"),
        (replaced(arrays, "encoder.0.bias", header), "encoder.0.bias has shape (99999999999999999,) instead of (16,)"),
        (replaced(arrays, "encoder.0.bias", npy(arrays["encoder.0.bias"]) + huge), "encoder.0.bias is longer than its"),
        (replaced(arrays | {"a\n\x1b[31m": 0}, "", b""), r"a\n\x1b[31m is unexpected"),
    ):
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError) as caught:
            MaskVQVAE.from_pretrained(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 1200
        assert peak < 20e6  # all arrays together take 8 MB


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_weights_that_are_not_finite(value, arrays, tmp_path):
    weight = arrays["decoder.0.weight"].astype(np.float64)
    weight[3, 4] = value
    path = write(tmp_path / "vae-nan.npz", arrays | {"decoder.0.weight": weight})
    with pytest.raises(ValueError, match="vae-nan.npz .*1 weight holds NaN or infinity.*: decoder.0.weight"):
        MaskVQVAE.from_pretrained(path)
    vae = MaskVQVAE()
    with torch.no_grad():
        vae.encoder[0].bias[0] = min(value, 1e5)  # beyond float16
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="Nothing was saved: .* encoder.0.bias"):
        vae.save_pretrained(tmp_path, path.name)
    assert path.read_bytes() == b"before"


def test_a_git_lfs_pointer(tmp_path):
    (tmp_path / "vae-lfs.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="vae-lfs.npz .* Git LFS pointer, so run `git lfs pull`"):
        MaskVQVAE.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def half(path, content):
        path.open("wb").write(content[:1000])
        raise OSError(28, "No space left on device")

    (tmp_path / "vae-emoji.npz").write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="vae-emoji.npz could not be saved .*No space left"):
        MaskVQVAE().save_pretrained(tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("vae-emoji.npz", b"before")]


def test_finding_the_file_in_a_folder(arrays, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError,
            match="no mask VQ-VAE at .* download gs://big_vision/paligemma/vae-oid.npz.*vae-emoji.npz",
        ):
            MaskVQVAE.from_pretrained(folder)
    path = write(tmp_path / "vae-one.npz", arrays)
    write(tmp_path / "other.npz", {})
    assert find_npz(tmp_path) == find_npz(path) == path
    MaskVQVAE.from_pretrained(str(tmp_path))
    write(tmp_path / "vae-two.npz", arrays)
    with pytest.raises(ValueError, match="vae-one.npz and vae-two.npz: pass the path of one"):
        MaskVQVAE.from_pretrained(tmp_path)
    assert find_npz(EMBEDDED) == EMBEDDED / "vae-emoji.npz"


def test_masks_use_the_functions_that_exercises_replace(monkeypatch):
    """``plugged_in`` puts a learner's function into its module, so every call must look it up there."""
    called = []
    for module, name in ((vqvae, "code_grid"), (locations, "paste_mask"), (locations, "crop_mask")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, own=own, name=name: called.append(name) or own(*given))
    vae, box = MaskVQVAE(), (0, 0, 8, 8)
    (codes,) = vae.codes_from_masks([np.ones((8, 8), bool)], [box])
    vae.masks_from_detections([Detection("cat", box, codes)], 8, 8)
    assert called == ["crop_mask", "code_grid", "paste_mask"]
