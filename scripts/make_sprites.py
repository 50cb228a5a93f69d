"""Build data/emoji (one sprite sheet per artist, index.json) and data/images (photos, textures, scenes).

    python scripts/make_sprites.py FOLDER

FOLDER holds the unpacked npm packages, each under its own name, for example FOLDER/@twemoji/svg. To fill it:

    for p in emoji-datasource-google@16.0.0 fluentui-emoji@1.3.0 openmoji@17.0.0 @twemoji/svg@15.0.0 \\
        @iconify-json/noto-v1@1.2.5 @iconify-json/fxemoji@1.2.2 @iconify-json/emojione@1.2.3 \\
        @iconify-json/streamline-emojis@1.2.4; do
        mkdir -p FOLDER/${p%@*} && tar xzf $(npm pack --silent $p) -C FOLDER/${p%@*} --strip-components=1
    done

Needs `pip install resvg-py scikit-image` beside the package's own dependencies. The results are in the repository, so
this is not needed to use minivlm. Origins and licenses: data/README.md.
"""

import argparse
import functools
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

# role and npm package of each artist
ARTISTS = {
    "noto": ("train", "emoji-datasource-google"),
    "fluent": ("train", "fluentui-emoji"),
    "fluent_flat": ("train", "fluentui-emoji"),
    "noto_blob": ("train", "@iconify-json/noto-v1"),
    "fxemoji": ("train", "@iconify-json/fxemoji"),
    "emojione": ("train", "@iconify-json/emojione"),
    "streamline": ("train", "@iconify-json/streamline-emojis"),
    "openmoji": ("development", "openmoji"),
    "twemoji": ("unseen", "@twemoji/svg"),
}
# Icon sets go by name. These icons are called neither what Fluent calls them nor what TABLE does.
ICONS = {
    "noto_blob": {"target": "direct-hit"},
    "fxemoji": {
        "fox": "foxsmiling",
        "panda": "pandaface",
        "rabbit": "bunny",
        "whale": "spurtingwhale",
        "eggplant": "aubergine",
        "pepper": "chilipepper",
        "pizza": "sliceofpizza",
        "train": "steamlocomotive",
        "laptop": "oldpersonalcomputer",
        "telephone": "blacktelephone",
        "umbrella": "umbrellawithraindrops",  # "umbrella" is a closed one
        "shoe": "mensrunner",
        "backpack": "schoolsatchel",
        "gift": "present",
        "target": "directhit",
        "castle": "europeancastle",
        "house": "housebuilding",
        "diamond": "gem",
    },
    "emojione": {"target": "direct-hit", "robot": "robot-face"},
    "streamline": {
        "fox": "fox-face-2",
        "panda": "panda-face",
        "lion": "lion-face",
        "frog": "frog-face",
        "penguin": "penguin-2",
        "unicorn": "unicorn-face",
        "cactus": "cactus-1",
        "sunflower": "sunflower-1",
        "strawberry": "strawberry-1",
        "watermelon": "watermelon-2",
        "pizza": "pizza-1",
        "hamburger": "hamburger-2",
        "donut": "doughnut-1",
        "book": "green-book",
        "backpack": "school-backpack",
        "gift": "wrapped-gift-1",
        "target": "direct-hit",
        "robot": "robot-face-1",
        "heart": "heart-suit",
    },
}
# Drawings that show another thing than their name says, or another object of TABLE too.
EXCLUDED = {
    "noto_blob": {"laptop"},  # a desktop computer
    "streamline": {
        "leaf",  # a hemp leaf
        "house",  # stands beside a tree of its own size
    },
}

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


def rasterize(svg: str) -> Image.Image:
    """An SVG drawing as a CELL × CELL RGBA image."""
    import resvg_py

    data = resvg_py.svg_to_bytes(svg_string=svg, width=CELL, height=CELL)
    drawing = Image.open(io.BytesIO(bytes(data))).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))  # a few drawings are a pixel short of square
    cell.paste(drawing, ((CELL - drawing.width) // 2, (CELL - drawing.height) // 2))
    return cell


@functools.cache
def icon_set(path: Path) -> dict:
    """The content of an icon set's icons.json."""
    return json.loads(path.read_text(encoding="utf-8"))


def icon(artist: str, folder: Path, entry: dict) -> str | None:
    """SVG text of an object from an icon set, None if the set lacks it."""
    icons = icon_set(folder / "icons.json")
    names = [entry["fluent"], entry["fluent"].replace("-", ""), entry["name"]]
    if entry["name"] in ICONS[artist]:
        names = [ICONS[artist][entry["name"]]]
    for name in names:
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name in icons["icons"]:
            drawing = icons["icons"][name]
            width, height = (drawing.get(side, icons[side]) for side in ("width", "height"))
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{drawing["body"]}</svg>'
            )
    return None


def draw(artist: str, folder: Path, entry: dict) -> Image.Image | None:
    """One artist's image of one object, from the artist's npm package. None if there is none, or none to use."""
    if entry["name"] in EXCLUDED.get(artist, ()):
        return None
    code = entry["code_point"]
    if artist == "noto":
        return Image.open(folder / "img" / "google" / str(CELL) / f"{code}.png").convert("RGBA")
    if artist in ICONS:
        svg = icon(artist, folder, entry)
        return rasterize(svg) if svg else None
    code = code.removesuffix("-fe0f")
    path = {
        "fluent": folder / "icons" / "modern" / f"{entry['fluent']}.svg",
        "fluent_flat": folder / "icons" / "flat" / f"{entry['fluent']}.svg",
        "openmoji": folder / "color" / "svg" / f"{code.upper()}.svg",
        "twemoji": folder / f"{code}.svg",
    }[artist]
    return rasterize(path.read_text(encoding="utf-8"))


def sheet(artist: str, folder: Path, entries: list[dict]) -> tuple[Image.Image, list[str]]:
    """All objects of one artist in rows of COLUMNS cells, and the names of those whose cells stay empty.

    Fully transparent pixels are zeroed so that they compress.
    """
    rows = -(-len(entries) // COLUMNS)
    canvas = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
    missing = []
    for k, entry in enumerate(entries):
        image = draw(artist, folder, entry)
        if image is None:
            missing.append(entry["name"])
            continue
        y, x = k // COLUMNS * CELL, k % COLUMNS * CELL
        canvas[y : y + CELL, x : x + CELL] = np.asarray(image)
    canvas[canvas[..., 3] == 0] = 0
    return Image.fromarray(canvas), missing


def write_sheets(folder: Path) -> None:
    """The sheets and index.json."""
    entries, artists = objects(), []
    (DATA / "emoji").mkdir(parents=True, exist_ok=True)
    for artist, (role, package) in ARTISTS.items():
        image, missing = sheet(artist, folder / package, entries)
        image.save(DATA / "emoji" / f"{artist}.png", optimize=True)
        artists.append({"name": artist, "role": role, "sheet": f"{artist}.png", "missing": missing})
    index = {
        "cell": CELL,
        "columns": COLUMNS,
        "artists": artists,
        "objects": [{k: v for k, v in e.items() if k != "fluent"} for e in entries],
    }
    lines = json.dumps(index, indent=1, ensure_ascii=False)
    (DATA / "emoji" / "index.json").write_text(lines + "\n", encoding="utf-8")


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
    parser.add_argument("folder", type=Path)
    write_sheets(parser.parse_args().folder)
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
