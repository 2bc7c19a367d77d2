"""Render synthetic people: cartoon faces in eight scenes, six shirts and four styles.

A picture is `render(identity, view)`. The identity is the person, about forty numbers; the view is the rest,
from pose and light to scene and style. Captions describe the view and say man or woman, nothing else of the
person. As a script it writes a people data set, a folder per person. All randomness comes from the given
generator: the same seed gives the same pictures.
"""

import argparse
import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

SCENES = {
    "beach": "at the beach",
    "city": "in the city",
    "forest": "in the forest",
    "desert": "in the desert",
    "night": "at night",
    "sunset": "at sunset",
    "studio": "in a studio",
    "room": "in a room",
}  # and how a caption says them
SHIRTS = {
    "red": "D42121",
    "blue": "2147D1",
    "green": "1A9438",
    "yellow": "F7CC1F",
    "black": "1A1A1F",
    "white": "F2F2ED",
}
STYLES = {"photo": "a photo", "painting": "a painting", "sketch": "a sketch", "neon": "a neon picture"}

# Lengths are in half face widths from the face's middle, y down: eyes near 0, mouth near .75, chin near 1.25.
IDENTITY = (
    *("woman", "skin_r", "skin_g", "skin_b", "face_width", "taper", "chin", "ear"),
    *("hair", "hair_r", "hair_g", "hair_b", "hair_length", "hair_volume", "hairline", "part"),
    *("eye_width", "eye_height", "eye_gap", "eye_tilt", "iris_r", "iris_g", "iris_b"),
    *("brow", "brow_slant", "nose_length", "nose_width", "mouth_width", "lips", "lip_red"),
    *("beard", "glasses", "glasses_r", "glasses_g", "glasses_b"),
    *("blush", "mole_x", "mole_y", "freckles", "earrings", "scar"),
)
VIEW = (  # angles in radians; the face's width and middle in picture widths; scene, shirt, style as positions
    *("yaw", "pitch", "roll", "width", "x", "y"),
    *("light_x", "light_y", "brightness", "warmth", "smile", "open"),
    *("scene_a", "scene_b", "scene_c", "scene", "shirt", "style"),
)

# Volume above the head; half width, lower end, flare and bumps of the outline; height of the hairline, its
# fall at the temples and its slant; radius and place of a bun (mirrored, so x > 0 makes two).
HAIR = {
    "bald": (0.0, 0.5, -0.5, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "short": (0.12, 1.06, 0.0, 0.0, 0.0, -0.70, 0.75, 0.0, 0.0, 0.0, -1.0),
    "parted": (0.20, 1.09, 0.05, 0.0, 0.0, -0.70, 0.80, 0.32, 0.0, 0.0, -1.0),
    "quiff": (0.14, 1.05, 0.0, 0.0, 0.0, -0.74, 0.70, 0.0, 0.56, 0.0, -1.04),
    "curly": (0.30, 1.22, 0.30, -0.2, 0.10, -0.66, 0.85, 0.0, 0.0, 0.0, -1.0),
    "afro": (0.20, 1.05, 0.0, 0.0, 0.0, -0.70, 0.80, 0.0, 1.46, 0.0, -0.42),
    "bob": (0.16, 1.24, 1.05, 0.10, 0.0, -0.56, 1.30, 0.0, 0.0, 0.0, -1.0),
    "long": (0.15, 1.20, 2.20, 0.10, 0.0, -0.72, 1.30, 0.18, 0.0, 0.0, -1.0),
    "wavy": (0.20, 1.26, 2.00, 0.10, 0.09, -0.68, 1.30, 0.0, 0.0, 0.0, -1.0),
    "bun": (0.10, 1.05, 0.10, 0.0, 0.0, -0.70, 0.75, 0.0, 0.46, 0.0, -1.48),
    "pigtails": (0.12, 1.08, 0.10, 0.0, 0.0, -0.58, 0.80, 0.0, 0.44, 1.34, 0.15),
}
MEN = (5, 5, 5, 4, 4, 2, 0, 1, 0, 0, 0)  # how often each hair is worn
WOMEN = (0, 1, 1, 0, 3, 2, 5, 5, 4, 3, 3)
SKINS = "FAD9C2 F2C29E DBA675 B27A52 805236 593829"
HAIRS = "141217 402414 73401F 9E331A E67321 F0C761 CCCCD1 3359BF E6669E 338C66"
HAIR_ODDS = (6, 6, 5, 4, 4, 6, 3, 1, 1, 1)
IRISES = "592E0F 2673E6 1F9440 73808C 9E660D"
FRAMES = "14141A BF1A1F 1A40B2 D9991A 731A80"
EYES_Y, MOUTH_Y, FOREHEAD_Y, HEAD_TOP = 0.04, 0.76, -0.85, 1.12
EDGE = 2.8  # slope of an edge per pixel: softer blurs the eyes, harder aliases


def draw_identities(n: int, generator: torch.Generator, **fixed: float | Tensor) -> Tensor:
    """Draw n people, (n, len(IDENTITY)); `fixed` sets columns by name, as woman=1 or hair=tensor of n."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def pick(odds: tuple) -> Tensor:
        return torch.multinomial(torch.tensor(odds).float(), n, replacement=True, generator=generator)

    def chance(p: float) -> Tensor:
        return (uniform(0, 1) < p).float()

    def colour(name: str, palette: str, odds: tuple | None = None) -> dict[str, Tensor]:
        rgb = _palette(palette)
        rgb = rgb[pick(odds or (1,) * len(rgb))] + uniform(-0.04, 0.04)[:, None]
        return {f"{name}_{c}": rgb[:, i].clamp(0.03, 1) for i, c in enumerate("rgb")}

    woman = torch.as_tensor(fixed["woman"]).float().expand(n) if "woman" in fixed else chance(0.5)
    man, sign = 1 - woman, 2 * chance(0.5) - 1
    person = {
        "woman": woman,
        **colour("skin", SKINS),
        "face_width": uniform(0.86, 1.08),
        "taper": uniform(-0.22, 0.22) + 0.14 * woman - 0.04,  # below 0 a square jaw, above 0 a narrow one
        "chin": uniform(1.10, 1.34),
        "ear": uniform(0.14, 0.26),
        "hair": torch.where(woman > 0, pick(WOMEN), pick(MEN)).float(),
        **colour("hair", HAIRS, HAIR_ODDS),
        "hair_length": uniform(-0.18, 0.18),
        "hair_volume": uniform(-0.05, 0.10),
        "hairline": uniform(-0.08, 0.10),
        "part": sign,
        "eye_width": uniform(0.25, 0.33),
        "eye_height": uniform(0.21, 0.32),
        "eye_gap": uniform(0.40, 0.46),
        "eye_tilt": uniform(-0.22, 0.22),
        **colour("iris", IRISES),
        "brow": uniform(0.035, 0.075) + 0.02 * man,
        "brow_slant": uniform(-0.25, 0.25),
        "nose_length": uniform(0.10, 0.22),
        "nose_width": uniform(0.09, 0.19),
        "mouth_width": uniform(0.24, 0.42),
        "lips": uniform(0.035, 0.075) + 0.02 * woman,
        "lip_red": uniform(0.2, 0.5) + 0.4 * woman,
        "beard": man * chance(0.5) * (1 + pick((1, 1, 1))),  # 0 none, 1 moustache, 2 goatee, 3 full
        "glasses": chance(0.25) * (1 + pick((1, 1))),  # 0 none, 1 round, 2 square
        **colour("glasses", FRAMES),
        "blush": uniform(0.0, 0.4),
        "mole_x": (2 * chance(0.5) - 1) * chance(0.25) * uniform(0.45, 0.60),  # 0: no mole
        "mole_y": uniform(0.52, 0.72),
        "freckles": chance(0.12),
        "earrings": woman * chance(0.4),
        "scar": chance(0.08),
    }
    return _columns(person, IDENTITY, fixed)


def draw_views(n: int, generator: torch.Generator, **fixed: float | Tensor) -> Tensor:
    """Draw n views, (n, len(VIEW)); `fixed` sets columns by name, as style=0 or width=0.5.

    Four faces of five are .35 to .6 of the picture wide, the others .2 to .9; the wider the face the nearer
    to the middle, so that both eyes are always in the picture.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def normal(limit: float = 2.0) -> Tensor:
        return torch.randn(n, generator=generator).clamp(-limit, limit)

    width = torch.where(uniform(0, 1) < 0.8, uniform(0.35, 0.60), uniform(0.2, 0.9))
    room = 1 - torch.as_tensor(fixed.get("width", width))
    mood = torch.randint(3, (n,), generator=generator)  # neutral, smile, open mouth
    view = {
        "yaw": (0.26 * normal()).clamp(-0.52, 0.52),
        "pitch": 0.08 * normal(),
        "roll": 0.09 * normal(2.3),
        "width": width,
        "x": 0.5 + 0.12 * room * normal(),
        "y": 0.5 + 0.07 * room * normal(),
        "light_x": uniform(-1, 1),
        "light_y": uniform(-1, 0.2),
        "brightness": uniform(0.82, 1.08),
        "warmth": uniform(-0.07, 0.07),
        "smile": torch.where(mood == 0, uniform(-0.15, 0.25), uniform(0.6, 1.0)),
        "open": (mood == 2) * uniform(0.6, 1.0),
        "scene": torch.randint(len(SCENES), (n,), generator=generator),
        **{f"scene_{k}": uniform(0, 1) for k in "abc"},
        "shirt": torch.randint(len(SHIRTS), (n,), generator=generator),
        "style": torch.randint(len(STYLES), (n,), generator=generator),
    }
    return _columns(view, VIEW, fixed)


def _columns(values: dict[str, Tensor], names: tuple, fixed: dict[str, float | Tensor]) -> Tensor:
    unknown = set(fixed) - set(names)
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}; possible: {', '.join(names)}")
    rows = torch.stack([values[name].float() for name in names], dim=1)
    for name, value in fixed.items():
        rows[:, names.index(name)] = value
    return rows


def _named(rows: Tensor, names: tuple) -> SimpleNamespace:
    """Split (n, k) into columns shaped (n, 1, 1, 1), and their colours name_r, _g, _b into (n, 3, 1, 1)."""
    columns = {name: rows[:, i].view(-1, 1, 1, 1) for i, name in enumerate(names)}
    colours = {
        k[:-2]: torch.cat([columns[f"{k[:-2]}_{c}"] for c in "rgb"], 1) for k in names if k.endswith("_r")
    }
    return SimpleNamespace(**columns, **{f"{k}_colour": v for k, v in colours.items()})


def _ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Approximate the signed distance to an ellipse of half axes a and b; right along the shorter."""
    small = torch.minimum(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else b
    x, y = x / a, y / b
    return (torch.sqrt(x * x + y * y) - 1) * small


def _thin(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Do the same for a flat ellipse, whose tips `_ellipse` blurs into long tails: divide by the gradient."""
    x, y = x / a, y / b
    reach = torch.sqrt(x * x + y * y)
    x, y = x / a, y / b
    return reach * (reach - 1) / torch.sqrt(x * x + y * y).clamp(min=1e-3)


def _palette(colours: str) -> Tensor:
    """Turn "RRGGBB RRGGBB ..." into (n, 3) in 0 .. 1."""
    return torch.tensor([list(bytes.fromhex(colour)) for colour in colours.split()]) / 255


def _rgb(colour: str) -> Tensor:
    return _palette(colour).view(1, 3, 1, 1)


@torch.no_grad()
def render(identities: Tensor, views: Tensor, size: int = 64, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """Render each person in the view of the same row: images (n, 3, size, size) in [-1, 1] and boxes (n, 4).

    A box (x0, y0, x1, y1) holds the visible face, forehead to chin, ear to ear: whole pixels, half open.
    """
    if len(identities) != len(views):
        raise ValueError(f"one view per identity: got {len(identities)} identities and {len(views)} views")
    if size % 8 or size <= 0:
        raise ValueError(f"size must be a positive multiple of 8, got {size}")
    images = torch.empty(len(views), 3, size, size)
    for i in range(0, len(views), chunk):
        images[i : i + chunk] = _draw(identities[i : i + chunk], views[i : i + chunk], size)
    return images, face_boxes(identities, views, size)


def face_boxes(identities: Tensor, views: Tensor, size: int = 64) -> Tensor:
    """Give the boxes of `render`: around the ellipse through forehead, chin and ears, turned by the roll."""
    person, view = _named(identities, IDENTITY), _named(views, VIEW)
    scale = view.width / 2
    half_w, half_h = person.face_width + 0.6 * person.ear, (person.chin - FOREHEAD_Y) / 2
    middle = (person.chin + FOREHEAD_Y) / 2
    cos, sin = view.roll.cos(), view.roll.sin()
    x, y = view.x - scale * middle * sin, view.y + scale * middle * cos
    dx = scale * torch.sqrt((half_w * cos) ** 2 + (half_h * sin) ** 2)
    dy = scale * torch.sqrt((half_w * sin) ** 2 + (half_h * cos) ** 2)
    box = torch.cat([(x - dx).mul(size).floor(), (y - dy).mul(size).floor()], 1)
    box = torch.cat([box, (x + dx).mul(size).ceil(), (y + dy).mul(size).ceil()], 1)
    return box.flatten(1).clamp(0, size).long()


def _draw(identities: Tensor, views: Tensor, size: int) -> Tensor:
    """Paint a batch back to front, scene to glasses; then light and style. (b, 3, size, size)"""
    p, v = _named(identities, IDENTITY), _named(views, VIEW)
    grid = (torch.arange(size) + 0.5) / size
    x, y = grid.view(1, 1, 1, size), grid.view(1, 1, size, 1)
    img = _scenes(v, x, y, size)
    scale = v.width / 2
    sharp = EDGE * size * scale

    def paint(distance: Tensor, colour: Tensor | str, opacity: Tensor | float = 1.0) -> None:
        colour = _rgb(colour) if isinstance(colour, str) else colour
        img.lerp_(colour.expand(len(img), -1, -1, -1), torch.sigmoid(distance * -sharp) * opacity)

    # Coordinates: b of the body, upright; h of the head, rolled; f of the features, moved by yaw and pitch.
    bx, by = (x - v.x) / scale, (y - v.y) / scale
    hx, hy = bx * v.roll.cos() + by * v.roll.sin(), by * v.roll.cos() - bx * v.roll.sin()
    turn = v.yaw.sin()
    fx, fy = hx - 0.42 * turn, hy - 0.9 * v.pitch
    fx = fx * (1 + 0.30 * turn * fx.clamp(-1.4, 1.4))  # the far half of a turned face is narrower
    ax, sides = fx.abs(), hx.abs()  # mirrored features are drawn once

    light = v.light_x * hx + v.light_y * hy
    skin, hair = p.skin_colour * (1 + 0.11 * light), p.hair_colour * (1 + 0.16 * light)
    shade = p.skin_colour * _rgb("B89E99")

    # Body, hair behind it, neck.
    shirt = _palette(" ".join(SHIRTS.values()))[v.shirt.flatten().long()].view(-1, 3, 1, 1)
    paint(_ellipse(bx, (by - 3.1).clamp(max=0), 2.0, 1.55), shirt * (1 + 0.05 * v.light_x * bx))
    style = torch.tensor(list(HAIR.values()))[p.hair.flatten().long()].view(-1, 11, 1, 1, 1)
    volume, half, end, flare, bumps, line, fall, slant, bun, bun_x, bun_y = style.unbind(1)
    haired = (p.hair > 0).float()
    half = (half + p.hair_volume) * p.face_width + flare * hy.clamp(min=0)
    mane = _ellipse(hx, hy.clamp(max=0), half, HEAD_TOP + (volume + p.hair_volume) * haired)
    mane = mane + bumps * torch.cos(7 * hx) * torch.cos(7 * hy)
    mane = torch.maximum(mane, hy - end - p.hair_length * (end > 0.5))
    mane = torch.minimum(mane, torch.hypot(sides - bun_x, hy - bun_y) - bun)
    paint(mane, hair * 0.85, haired)
    paint(torch.maximum(_ellipse(bx, by - 1.2, 0.46, 0.75), 0.3 - by), shade)

    # Head.
    paint(_ellipse(sides - p.face_width, hy - 0.12 + 0.5 * v.pitch, 0.7 * p.ear, p.ear), p.skin_colour * 0.88)
    down = hy.clamp(min=0)
    across = hx / p.face_width * (1 + p.taper * down * down)
    head = torch.sqrt(across**2 + (hy.clamp(max=0) / HEAD_TOP) ** 2 + (down / p.chin) ** 2) - 1
    paint(head, skin)
    paint(_ellipse(sides - p.face_width - 0.02, hy - 0.18 - p.ear, 0.09, 0.09), "FFD133", p.earrings)

    # Cheeks and beard; freckles stay below the eyes.
    img *= 1 - torch.exp(((ax - 0.58) ** 2 + (fy - 0.48) ** 2) / -0.045) * p.blush * _rgb("007373")
    beard = hair * 0.75
    paint(torch.maximum(head, 0.52 - 0.35 * ax**2 - fy), beard, (p.beard == 3) * 0.92)
    paint(_ellipse(fx, fy - p.chin + 0.16, 0.30, 0.24), beard, p.beard == 2)
    paint(_thin(fx, fy - 0.60 - 0.5 * fx**2, 0.38, 0.09), beard, (p.beard == 1) | (p.beard == 2))
    dots = 0.045 - 0.1 * torch.cos(19 * ax) * torch.cos(19 * fy)
    paint(torch.maximum(dots, _ellipse(ax - 0.52, fy - 0.52, 0.26, 0.14)), shade, p.freckles * 0.65)
    paint(_ellipse(fx - p.mole_x, fy - p.mole_y, 0.065, 0.065), "2E1712", p.mole_x != 0)
    scar = _thin(fx + 0.74 - 0.4 * fy, fy - 0.6, 0.045, 0.2)
    paint(scar, p.skin_colour * _rgb("FFBBB4"), p.scar)

    # Nose, nearer than the face and so moved more, and mouth: lips, and inside them what an open mouth shows.
    nose_x, nose_y = hx - 0.56 * turn, fy - p.nose_length
    paint(_ellipse(nose_x, nose_y - 0.30, p.nose_width, 0.085), shade)
    paint(_ellipse(nose_x, nose_y - 0.24, p.nose_width * 0.8, 0.085), skin * 1.06)
    curved = fy - MOUTH_Y + v.smile * (0.9 * fx**2 - 0.095)
    gape = 0.10 * v.open
    paint(_thin(fx, curved, p.mouth_width, p.lips + gape), torch.lerp(shade, _rgb("CC242E"), p.lip_red))
    paint(_thin(fx, curved, p.mouth_width * 0.75, gape + 1e-3), "4C0D0F", v.open)

    # Hair over the forehead; eyes and brows over the hair, so that no fringe hides them.
    line = line + p.hairline + fall * (fx * fx) ** 2 + slant * p.part * fx
    paint(torch.maximum(mane, fy - line), hair, haired)
    worn = (p.glasses > 0).float()
    ex, level = ax - p.eye_gap, fy - EYES_Y
    ey = level + p.eye_tilt * ex
    eye = _ellipse(ex, ey, p.eye_width, p.eye_height)
    lashes = _ellipse(ex, ey + 0.05, p.eye_width + 0.03, p.eye_height + 0.03)
    paint(lashes, "1F1414", (0.5 + 0.45 * p.woman) * (1 - 0.6 * worn))
    paint(eye, "FAFAFA")
    iris = torch.minimum(p.eye_width, p.eye_height) * 0.74
    middle = torch.sqrt(ex * ex + ey * ey)
    paint(torch.maximum(middle - iris, eye), p.iris_colour)
    paint(middle - 0.52 * iris, "08080A")
    paint(_ellipse(ex + 0.2 * iris, ey + 0.35 * iris, 0.28 * iris, 0.28 * iris), "FFFFFF")
    lift = torch.maximum(p.eye_height, 0.31 * worn) + 0.16 + p.brow + 0.25 * p.brow_slant.abs()
    brow = _thin(ex, level + lift + p.brow_slant * ex - 0.5 * ex**2, 0.30, p.brow)
    paint(brow, (p.hair_colour * 0.6).clamp(max=0.5))
    square = torch.maximum(ex.abs() - 0.38, level.abs() - 0.35)
    ring = torch.where(p.glasses == 2, square, _ellipse(ex, level, 0.39, 0.39))
    bridge = torch.maximum(ax - p.eye_gap + 0.38, (level + 0.04).abs() - 0.03)
    paint(torch.minimum(ring.abs() - 0.035, bridge), p.glasses_colour, worn)

    img *= v.brightness * torch.cat([1 + v.warmth, torch.ones_like(v.warmth), 1 - v.warmth], 1)
    return _stylise(img.clamp_(0, 1), v.style.flatten(), max(1, size // 64)) * 2 - 1


def _scenes(v: SimpleNamespace, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Render the scenes, (b, 3, size, size) in 0 .. 1."""
    img = torch.empty(len(v.scene), 3, size, size)
    for number, name in enumerate(SCENES):
        rows = v.scene.flatten() == number
        if rows.any():
            scene, layers = _scene(name, x, y, v.scene_a[rows], v.scene_b[rows], v.scene_c[rows])
            for distance, colour in layers:
                scene = torch.lerp(scene, _rgb(colour), torch.sigmoid(distance * (-EDGE * size)))
            img[rows] = scene
    return img


def _scene(name: str, x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, list]:
    """Give a scene's sky and the shapes before it: (signed distance, colour). a, b, c in 0 .. 1 move them."""

    def sky(top: str, bottom: str, down: Tensor = y) -> Tensor:
        return torch.lerp(_rgb(top), _rgb(bottom), down.clamp(max=1))

    def block(left: Tensor, right: Tensor, top: Tensor | float, bottom: Tensor | float = 1.5) -> Tensor:
        return torch.maximum(torch.maximum(left - x, x - right), torch.maximum(top - y, y - bottom))

    horizon, side = 0.42 + 0.16 * a, 0.15 + 0.7 * (c > 0.5)
    if name == "beach":
        sea, sand = horizon - y, horizon + 0.16 + 0.03 * torch.cos(7 * x + 6 * c) - y
        cloud = _ellipse(x - b, y - 0.16, 0.20, 0.07)
        return sky("5CB3FA", "D9F2FF", y / horizon), [(cloud, "FFFFFF"), (sea, "0D6BC2"), (sand, "F7E09E")]
    if name == "city":
        gaps = torch.maximum(torch.cos(36 * x) * -0.028, torch.cos(34 * y + 3) * -0.028) + 0.006
        houses = []
        for k, wall in enumerate(("9E9EAD", "757585", "8A8A99", "666675", "80808F")):
            left, roof = 0.27 * k - 0.22 + 0.2 * b, 0.22 + 0.26 * torch.sin(9 * c + 2.4 * k) ** 2
            house = block(left, left + 0.25, roof)
            houses += [(house, wall), (torch.maximum(house + 0.025, gaps), "FFE080")]
        return sky("B3CCE6", "E6E6E0"), houses
    if name == "forest":
        trunks = [
            (block(k + 0.25 * b, k + 0.11 + 0.25 * b, 0.0), "5C381F") for k in (-0.17, 0.15, 0.47, 0.79)
        ]
        leaves = y - 0.20 - 0.07 * torch.sin(13 * x + 6 * c).abs() - 0.08 * a
        return sky("73B852", "336B24"), [*trunks, (leaves, "145724"), (0.80 + 0.05 * a - y, "29751F")]
    if name == "desert":
        far = horizon - 0.06 * torch.sin(6 * x + 6 * b) - y
        near = horizon + 0.22 + 0.07 * torch.sin(5 * x + 6 * c) - y
        stem, arm = block(side - 0.035, side + 0.035, 0.22), block(side, side + 0.115, 0.41, 0.465)
        cactus = torch.minimum(stem, arm)
        cactus = torch.minimum(cactus, block(side + 0.065, side + 0.115, 0.30, 0.465))
        return sky("6BC7DB", "FAEBB8"), [(far, "E69942"), (cactus, "297A3D"), (near, "CC752B")]
    if name == "night":
        places = [((k * 0.23 + b) % 1, 0.08 + 0.09 * (2 * k % 5)) for k in range(5)]
        stars = [(_ellipse(x - left, y - top, 0.018, 0.018), "F2F2BF") for left, top in places]
        moon = _ellipse(x - side, y - 0.16, 0.10, 0.10)
        hill = horizon + 0.25 - 0.06 * torch.sin(6 * x + 6 * b) - y
        return sky("050824", "1F245C"), [*stars, (moon, "FFF7CC"), (hill, "08121F")]
    if name == "sunset":
        sun = _ellipse(x - side, y - horizon, 0.15, 0.15)
        return sky("612985", "FF8C33", y / horizon), [(sun, "FFE666"), (horizon - y, "6B245C")]
    if name == "studio":
        glow = torch.exp(-((x - 0.2 - 0.6 * b) ** 2 + (y - 0.35) ** 2) / 0.25)
        return (0.42 + 0.15 * a + 0.30 * glow).expand(-1, 3, -1, -1), []
    window = block(side - 0.18, side + 0.22, 0.06, 0.46)
    panes = 0.02 - torch.minimum((x - side - 0.02).abs(), (y - 0.26).abs())
    glass, floor = torch.maximum(window + 0.035, panes), 0.74 + 0.1 * a - y
    return sky("DB9E94", "F0BDA8"), [(window, "FAF5E6"), (glass, "99D6FA"), (floor, "804D29")]


def _stylise(img: Tensor, style: Tensor, step: int) -> Tensor:
    """Turn pictures in 0 .. 1 into their styles; `step` is 1 at 64 pixels."""
    for number, name in enumerate(STYLES):
        rows = style == number
        if name == "photo" or not rows.any():
            continue
        flat = img[rows]
        grey = (flat * _rgb("4C961D")).sum(1, keepdim=True)  # the usual weights .30, .59, .11
        around = grey
        for _ in range(2):  # twice a box is round enough
            around = avg_pool2d(around, 4 * step + 1, 1, 2 * step, count_include_pad=False)
        if name == "painting":
            rich = grey + 1.7 * (flat - grey)
            rich = rich + torch.sin(rich * (-8 * math.pi)) / (8 * math.pi)  # soft steps of a quarter
            img[rows] = rich + (grey - 0.5) * torch.tensor([0.25, 0.12, -0.30]).view(1, 3, 1, 1)
        elif name == "sketch":  # what is darker than its surroundings is a pencil line
            line = ((grey + 0.2) / (around + 0.2)).clamp(max=1) ** 3
            img[rows] = _rgb("F7F0DB") * (0.58 + 0.42 * flat) * line
        else:  # what is brighter than its surroundings glows
            glow = (2.5 * (grey - around)).clamp(0, 1)
            rich = (grey + 1.5 * (flat - grey)).clamp(0, 1)
            img[rows] = rich * _rgb("997AD9") + _rgb("0D0029") + glow * _rgb("00BFA6")
    return img.clamp_(0, 1)


def caption(view: Tensor, identity: Tensor, generator: torch.Generator, named: float = 1.0) -> str:
    """Say style, man or woman, scene and shirt of a picture: "a photo of a man at night wearing a red shirt".

    `named` is the probability that each of scene, shirt and the style photo is told. Other styles always are,
    so a scene or shirt that a caption leaves out is random, and a style it leaves out is photo.
    """
    tell_scene, tell_shirt, tell_style = (torch.rand(3, generator=generator) < named).tolist()
    swap, wearing = (torch.rand(2, generator=generator) < 0.5).tolist()
    scene, shirt, style = (int(view[VIEW.index(name)]) for name in ("scene", "shirt", "style"))
    who = "a woman" if identity[IDENTITY.index("woman")] > 0.5 else "a man"
    start = f"{list(STYLES.values())[style]} of {who}" if tell_style or style else who
    where = [list(SCENES.values())[scene]] * tell_scene
    clothes = [f"{'wearing' if wearing else 'in'} a {list(SHIRTS)[shirt]} shirt"] * tell_shirt
    return " ".join([start, *clothes, *where] if swap else [start, *where, *clothes])


def training_pictures(n: int, generator: torch.Generator, size: int = 64, named: float = 0.85) -> tuple:
    """Generate n people, one picture each: images (n, 3, size, size), list of captions, boxes (n, 4)."""
    identities, views = draw_identities(n, generator), draw_views(n, generator)
    images, boxes = render(identities, views, size)
    return images, [caption(v, i, generator, named) for v, i in zip(views, identities, strict=True)], boxes


def to_pil(image: Tensor) -> Image.Image:
    """Turn (3, h, w) in [-1, 1] into a picture."""
    return Image.fromarray(((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_people(
    out: Path, people: int, photos: int, seed: int, size: int = 64, photo_share: float = 0.85
) -> None:
    """Write `people` folders of `photos` pictures <k>.png, captions <k>.txt, and boxes in faces.json.

    A person depends on the seed and its own number only. Raises if `out` holds anything but this data set.
    """
    settings = {"people": people, "photos": photos, "seed": seed, "size": size, "photo_share": photo_share}
    record = out / "people.json"
    same = record.exists() and json.loads(record.read_text()) == settings
    if out.exists() and any(out.iterdir()) and not same:
        raise FileExistsError(f"{out} is not empty and does not hold the data set {settings}")
    out.mkdir(parents=True, exist_ok=True)
    _write(record, json.dumps(settings).encode())
    for pid in range(people):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + pid)
        identity, views = draw_identities(1, generator), draw_views(photos, generator)
        views[torch.rand(photos, generator=generator) < photo_share, VIEW.index("style")] = 0
        images, boxes = render(identity.expand(photos, -1), views, size)
        folder = out / f"{'woman' if identity[0, IDENTITY.index('woman')] > 0.5 else 'man'}_{pid:03d}"
        folder.mkdir(exist_ok=True)
        for k in range(photos):
            png = io.BytesIO()
            to_pil(images[k]).save(png, format="png")
            _write(folder / f"{k:03d}.png", png.getvalue())
            _write(folder / f"{k:03d}.txt", caption(views[k], identity[0], generator).encode())
        faces = {f"{k:03d}.png": box for k, box in enumerate(boxes.tolist())}
        _write(folder / "faces.json", json.dumps(faces).encode())


def _write(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename, so that a stopped run leaves no half file."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description="Write a data set of synthetic people", formatter_class=formatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder: new, empty, or holding this data set"
    )
    parser.add_argument("--people", type=int, default=60, help="number of people")
    parser.add_argument("--photos", type=int, default=20, help="pictures per person")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other people")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels, a multiple of 8")
    parser.add_argument(
        "--photo-share", type=float, default=0.85, help="share of photos, the rest is any style"
    )
    args = parser.parse_args()
    start = time.time()
    write_people(**vars(args))
    print(f"{args.people} people x {args.photos} pictures in {args.out}: {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
