"""Build data/emoji (one sprite sheet per artist, index.json) and data/images (photos, textures, scenes).

    python scripts/make_sprites.py NOTO TWEMOJI FLUENT

NOTO, TWEMOJI and FLUENT are the unpacked npm packages `emoji-datasource-google`, `@twemoji/svg` and `fluentui-emoji`.
Needs `pip install resvg-py scikit-image` beside the package's own dependencies. The results are in the repository, so
this is not needed to use minivlm. Origins and licenses: data/README.md.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).resolve().parent.parent / "data"
CELL, COLUMNS = 64, 10

# name, Unicode code point (as in Noto's file names), Fluent's file name
TABLE = """
cat 1f431 cat-face|dog 1f436 dog-face|fox 1f98a fox|panda 1f43c panda|koala 1f428 koala|lion 1f981 lion
frog 1f438 frog|pig 1f437 pig-face|rabbit 1f430 rabbit-face|penguin 1f427 penguin|owl 1f989 owl|duck 1f986 duck
flamingo 1f9a9 flamingo|turtle 1f422 turtle|snake 1f40d snake|snail 1f40c snail|crab 1f980 crab|octopus 1f419 octopus
whale 1f433 spouting-whale|butterfly 1f98b butterfly|bee 1f41d honeybee|ladybug 1f41e lady-beetle
spider 1f577-fe0f spider|elephant 1f418 elephant|giraffe 1f992 giraffe|zebra 1f993 zebra|unicorn 1f984 unicorn
dinosaur 1f995 sauropod|cactus 1f335 cactus|tree 1f333 deciduous-tree|sunflower 1f33b sunflower|rose 1f339 rose
mushroom 1f344 mushroom|leaf 1f341 maple-leaf|apple 1f34e red-apple|banana 1f34c banana|strawberry 1f353 strawberry
watermelon 1f349 watermelon|pineapple 1f34d pineapple|lemon 1f34b lemon|avocado 1f951 avocado|carrot 1f955 carrot
eggplant 1f346 eggplant|pepper 1f336-fe0f hot-pepper|pumpkin 1f383 jack-o-lantern|pizza 1f355 pizza
hamburger 1f354 hamburger|donut 1f369 doughnut|cupcake 1f9c1 cupcake|croissant 1f950 croissant|pretzel 1f968 pretzel
lollipop 1f36d lollipop|car 1f697 automobile|bus 1f68c bus|bicycle 1f6b2 bicycle|tractor 1f69c tractor
train 1f682 locomotive|airplane 2708-fe0f airplane|helicopter 1f681 helicopter|rocket 1f680 rocket
sailboat 26f5 sailboat|anchor 2693 anchor|guitar 1f3b8 guitar|drum 1f941 drum|trumpet 1f3ba trumpet
piano 1f3b9 musical-keyboard|camera 1f4f7 camera|television 1f4fa television|laptop 1f4bb laptop
telephone 260e-fe0f telephone|lightbulb 1f4a1 light-bulb|book 1f4d5 closed-book|pencil 270f-fe0f pencil|key 1f511 key
lock 1f512 locked|bell 1f514 bell|hammer 1f528 hammer|magnet 1f9f2 magnet|umbrella 2602-fe0f umbrella
trophy 1f3c6 trophy|crown 1f451 crown|hat 1f3a9 top-hat|shoe 1f45f running-shoe|backpack 1f392 backpack
balloon 1f388 balloon|gift 1f381 wrapped-gift|football 1f3c8 american-football|target 1f3af bullseye
clock 23f0 alarm-clock|moon 1f319 crescent-moon|star 2b50 star|snowman 26c4 snowman-without-snow
rainbow 1f308 rainbow|flame 1f525 fire|castle 1f3f0 castle|house 1f3e0 house|robot 1f916 robot
heart 2764-fe0f red-heart|diamond 1f48e gem-stone|bomb 1f4a3 bomb
"""
IRREGULAR = {"leaf": "leaves", "snowman": "snowmen"}  # `plural` makes the others
NOT_MIRRORED = {"clock", "telephone"}  # their faces have digits or hands
ARTISTS = {"noto": "train", "fluent": "train", "twemoji": "unseen"}

# file name, file in scikit-image's data folder; for textures also the crop (left, top, right, bottom)
PHOTOS = [
    ("cat.jpg", "chelsea.png"),
    ("coffee.jpg", "coffee.png"),
    ("astronaut.jpg", "astronaut.png"),
    ("rocket.jpg", "rocket.jpg"),
    ("camera.jpg", "camera.png"),
]
TEXTURES = [
    ("brick.png", "brick.png", (0, 0, 320, 320)),
    ("grass.png", "grass.png", (0, 0, 256, 256)),
    ("gravel.png", "gravel.png", (0, 0, 320, 320)),
    ("wood.png", "coffee.png", (480, 280, 600, 400)),
    ("fur.png", "chelsea.png", (190, 0, 285, 95)),
    ("stars.png", "hubble_deep_field.jpg", (0, 0, 400, 400)),
]


def plural(name: str) -> str:
    """English plural of a regular noun."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def article(name: str) -> str:
    """`an` before a vowel sound."""
    return "an" if name[0] in "aeiou" and name != "unicorn" else "a"


def objects() -> list[dict]:
    """The rows of TABLE as dictionaries for index.json, plus the Fluent file name."""
    rows = [entry.split() for line in TABLE.strip().splitlines() for entry in line.split("|")]
    return [
        {
            "name": name,
            "plural": plural(name),
            "article": article(name),
            "mirror": name not in NOT_MIRRORED,
            "code_point": code_point,
            "fluent": fluent,
        }
        for name, code_point, fluent in rows
    ]


def rasterize(path: Path) -> Image.Image:
    """An SVG file as a CELL × CELL RGBA image."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=CELL, height=CELL)
    drawing = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))  # a few drawings are a pixel short of square
    cell.paste(drawing, ((CELL - drawing.width) // 2, (CELL - drawing.height) // 2))
    return cell


def draw(artist: str, folder: Path, entry: dict) -> Image.Image:
    """One artist's image of one object, from the artist's npm package."""
    code = entry["code_point"]
    if artist == "noto":
        return Image.open(folder / "img" / "google" / str(CELL) / f"{code}.png").convert("RGBA")
    if artist == "fluent":
        return rasterize(folder / "icons" / "modern" / f"{entry['fluent']}.svg")
    return rasterize(folder / f"{code.removesuffix('-fe0f')}.svg")


def sheet(artist: str, folder: Path, entries: list[dict]) -> Image.Image:
    """All objects of one artist in rows of COLUMNS cells. Fully transparent pixels are zeroed so that they compress."""
    rows = -(-len(entries) // COLUMNS)
    canvas = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
    for k, entry in enumerate(entries):
        y, x = k // COLUMNS * CELL, k % COLUMNS * CELL
        canvas[y : y + CELL, x : x + CELL] = np.asarray(draw(artist, folder, entry))
    canvas[canvas[..., 3] == 0] = 0
    return Image.fromarray(canvas)


def write_photos() -> None:
    """Photos (JPEG, longer side 448 at most) and textures (128 px PNG) that come with scikit-image."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    (DATA / "images" / "textures").mkdir(parents=True, exist_ok=True)
    for name, origin in PHOTOS:
        image = Image.open(source / origin)
        image.thumbnail((448, 448), Image.LANCZOS)
        image.save(DATA / "images" / name, quality=88, optimize=True)
    for name, origin, box in TEXTURES:
        image = Image.open(source / origin).crop(box).resize((128, 128), Image.LANCZOS)
        image.save(DATA / "images" / "textures" / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for artist in ("noto", "twemoji", "fluent"):
        parser.add_argument(artist, type=Path)
    args = parser.parse_args()
    entries = objects()
    (DATA / "emoji").mkdir(parents=True, exist_ok=True)
    for artist in ARTISTS:
        sheet(artist, getattr(args, artist), entries).save(DATA / "emoji" / f"{artist}.png", optimize=True)
    index = {
        "cell": CELL,
        "columns": COLUMNS,
        "artists": [{"name": a, "role": role, "sheet": f"{a}.png"} for a, role in ARTISTS.items()],
        "objects": [{k: v for k, v in e.items() if k != "fluent"} for e in entries],
    }
    lines = json.dumps(index, indent=1, ensure_ascii=False)
    (DATA / "emoji" / "index.json").write_text(lines + "\n", encoding="utf-8")
    write_photos()
    write_scenes()


def write_scenes() -> None:
    """The images of `python -m minivlm demo`, rendered from the sheets just written."""
    from minivlm import emoji
    from minivlm.__main__ import DEMO

    (DATA / "images" / "scenes").mkdir(parents=True, exist_ok=True)
    for split, seed in DEMO:
        image = Image.fromarray(emoji.make_scene(seed, split).image)
        image.save(DATA / "images" / "scenes" / f"{split}-{seed}.png", optimize=True)


if __name__ == "__main__":
    main()
