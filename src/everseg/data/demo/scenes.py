"""Painting one street scene: sky, ground, houses, then trees, cars, persons and signs by distance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

ROAD, BUILDING, TREE, CAR, PERSON, SIGN = range(1, 7)
"""Raw ids; 0 is the background: the sky, the verges and the pavements."""
_TEXTURE = np.array([3, 4, 5, 13, 3, 4, 3], np.float32)
"""Standard deviation of the pixel noise per raw id, grey levels."""
_FINE = 2
"""Scenes are drawn so many times larger and reduced, so that edges are smooth."""
_Colour = tuple[int, int, int]
_Point = tuple[float, float]


def scene(seed: int, size: tuple[int, int], *, dusk: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Paint one street scene.

    Args:
        seed: decides everything.
        size: (height, width), pixels.
        dusk: the same scene in little, bluish light, taken with a grainy camera.

    Returns:
        image (height, width, 3) uint8 and mask (height, width) uint8 of raw ids.
    """
    painter = _Painter(random.Random(seed), size)
    painter.sky()
    painter.ground()
    painter.street_sides()
    painter.objects()
    image, mask = painter.finish()
    lit = _light(image, mask, painter.rng)
    return (_dusk(lit, painter.rng) if dusk else lit), mask


class _Painter:
    """Paints colour and id of the same shape at once, far things first."""

    def __init__(self, rng: random.Random, size: tuple[int, int]) -> None:
        self.rng = rng
        self.height, self.width = size[0] * _FINE, size[1] * _FINE
        self.image = Image.new("RGB", (self.width, self.height))
        self.mask = Image.new("L", (self.width, self.height), 0)
        self.colours, self.ids = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        self.horizon = self.height * rng.uniform(0.34, 0.46)
        self.vanish = self.width * rng.uniform(0.38, 0.62)
        self.road_left = self.width * rng.uniform(0.02, 0.2)
        self.road_right = self.width * rng.uniform(0.8, 0.98)

    def shape(self, kind: str, points: Sequence[_Point], colour: _Colour, raw: int | None = None) -> None:
        """Draw a polygon, ellipse or rectangle; without an id only its colour (windows, shadows, markings)."""
        getattr(self.colours, kind)(points, fill=colour)
        if raw is not None:
            getattr(self.ids, kind)(points, fill=raw)

    def varied(self, colour: _Colour, by: int = 12) -> _Colour:
        """A colour near the given one."""
        shift = self.rng.uniform(-by, by)
        r, g, b = (int(min(255, max(0, c + shift + self.rng.uniform(-by, by) / 2))) for c in colour)
        return r, g, b

    def floor(self, depth: float) -> float:
        """Height in the picture of the ground at a depth: 0 is the horizon, 1 the lower edge."""
        return self.horizon + depth * (self.height - self.horizon)

    def across(self, place: float, depth: float) -> float:
        """Where a line along the street passes: place 0 and 1 are the road's edges."""
        near = self.road_left + place * (self.road_right - self.road_left)
        return self.vanish + depth * (near - self.vanish)

    def sky(self) -> None:
        top, low = self.rng.choice(
            [
                ((86, 148, 224), (190, 220, 246)),
                ((150, 168, 190), (214, 220, 228)),
                ((104, 116, 178), (244, 190, 150)),
            ]
        )
        ramp = Image.linear_gradient("L").resize((self.width, int(self.horizon) + 1))
        self.image.paste(
            Image.composite(Image.new("RGB", ramp.size, low), Image.new("RGB", ramp.size, top), ramp)
        )
        for _ in range(self.rng.randint(0, 3)):
            x, y = self.rng.uniform(0, self.width), self.rng.uniform(0, self.horizon * 0.6)
            w, h = self.rng.uniform(0.1, 0.25) * self.width, self.rng.uniform(0.02, 0.05) * self.height
            self.shape("ellipse", [(x - w, y - h), (x + w, y + h)], self.varied((236, 240, 246), 6))

    def ground(self) -> None:
        grass = self.varied(self.rng.choice([(122, 150, 84), (168, 152, 110), (140, 146, 100)]))
        self.shape("rectangle", [(0, self.horizon), (self.width, self.height)], grass)
        walk, road = self.varied((186, 178, 168)), self.varied((92, 92, 100), 16)
        for lanes, colour, raw in (((-0.22, 1.22), walk, None), ((0.0, 1.0), road, ROAD)):
            left, right = lanes
            corners = [
                self.across(left, 0.03),
                self.across(right, 0.03),
                self.across(right, 1),
                self.across(left, 1),
            ]
            heights = [self.floor(0.03), self.floor(0.03), self.height, self.height]
            self.shape("polygon", list(zip(corners, heights, strict=True)), colour, raw)
        depth = self.rng.uniform(0.08, 0.14)
        while depth < 1:
            end = min(1.0, depth * 1.3)
            points = [
                (self.across(p, d), self.floor(d))
                for p, d in ((0.49, depth), (0.51, depth), (0.51, end), (0.49, end))
            ]
            self.shape("polygon", points, (226, 224, 214))
            depth *= 1.75

    def street_sides(self) -> None:
        """Rows of houses along the street; a gap now and then."""
        built = self.rng.choice([(True, True), (True, True), (True, False), (False, True)])
        for side, wanted in zip((-1, 1), built, strict=True):
            place = 0.5 + side * self.rng.uniform(0.95, 1.25)
            edges = [
                0.08,
                self.rng.uniform(0.16, 0.26),
                self.rng.uniform(0.36, 0.5),
                self.rng.uniform(0.7, 1.2),
            ]
            for far, near in pairwise(edges):
                if wanted and self.rng.random() < 0.85:
                    self.house(place, far, near)

    def house(self, place: float, far: float, near: float) -> None:
        tall = self.rng.uniform(0.8, 1.5) * self.height
        wall = self.varied(self.rng.choice([(176, 92, 72), (200, 164, 120), (158, 110, 90), (206, 196, 182)]))
        x = [self.across(place, far), self.across(place, near)]
        base = [self.floor(far), self.floor(near)]
        top = [base[0] - tall * far, base[1] - tall * near]
        back = x[0] + (x[0] - self.vanish) * 0.8
        dark = tuple(int(c * 0.75) for c in wall)
        gable = [(x[0], top[0]), (back, top[0]), (back, base[0]), (x[0], base[0])]
        self.shape("polygon", gable, (dark[0], dark[1], dark[2]), BUILDING)
        self.shape(
            "polygon", [(x[0], top[0]), (x[1], top[1]), (x[1], base[1]), (x[0], base[0])], wall, BUILDING
        )
        glass = self.varied((70, 84, 104))
        columns = 3
        for row in (0.12, 0.36, 0.6):
            for column in range(columns):
                corners = []
                for dx, dy in ((0.2, 0), (0.75, 0), (0.75, 0.14), (0.2, 0.14)):
                    f, v = (column + dx) / columns, row + dy
                    upper, lower = top[0] + f * (top[1] - top[0]), base[0] + f * (base[1] - base[0])
                    corners.append((x[0] + f * (x[1] - x[0]), upper + v * (lower - upper)))
                self.shape("polygon", corners, glass)

    def objects(self) -> None:
        """Trees, cars, persons and signs, from far to near."""
        rng, todo = self.rng, []
        for paint, chance, most, low, high in (
            (self.tree, 0.85, 3, 0.2, 0.65),
            (self.car, 0.85, 3, 0.25, 0.75),
            (self.person, 0.7, 3, 0.4, 0.8),
            (self.sign, 0.7, 2, 0.4, 0.75),
        ):
            if rng.random() < chance:
                todo += [(rng.uniform(low, high), paint) for _ in range(rng.randint(1, most))]
        for depth, paint in sorted(todo, key=lambda item: item[0]):
            paint(depth)

    def shadow(self, x: float, y: float, half: float) -> None:
        self.shape("ellipse", [(x - half, y - half * 0.16), (x + half, y + half * 0.16)], (58, 58, 64))

    def side(self, near: float, far: float) -> float:
        """A place beside the road, left or right."""
        offset = self.rng.uniform(near, far)
        return -offset if self.rng.random() < 0.5 else 1 + offset

    def tree(self, depth: float) -> None:
        x, y, h = self.across(self.side(0.16, 0.5), depth), self.floor(depth), depth * self.height * 0.95
        self.shadow(x, y, h * 0.25)
        trunk = self.varied((98, 70, 48))
        self.shape("rectangle", [(x - h * 0.05, y - h * 0.5), (x + h * 0.05, y)], trunk, TREE)
        leaf = self.varied(self.rng.choice([(44, 104, 44), (64, 124, 40), (36, 88, 60)]), 14)
        for _ in range(5):
            cx, cy = x + self.rng.uniform(-0.16, 0.16) * h, y - self.rng.uniform(0.5, 0.8) * h
            r = self.rng.uniform(0.15, 0.22) * h
            self.shape("ellipse", [(cx - r, cy - r), (cx + r, cy + r)], self.varied(leaf, 10), TREE)

    def car(self, depth: float) -> None:
        lane = self.rng.choice([0.25, 0.75]) + self.rng.uniform(-0.08, 0.08)
        x, y = self.across(lane, depth), self.floor(depth)
        w = depth * self.width * self.rng.uniform(0.16, 0.2)
        h = w * self.rng.uniform(0.62, 0.75)
        body = self.varied(
            self.rng.choice(
                [(204, 40, 44), (36, 72, 190), (240, 240, 244), (24, 150, 150), (30, 30, 38), (236, 190, 40)]
            )
        )
        self.shadow(x, y, w * 1.15)
        for sx in (-0.72, 0.72):
            wheel = [(x + sx * w - w * 0.17, y - h * 0.42), (x + sx * w + w * 0.17, y + h * 0.05)]
            self.shape("rectangle", wheel, (22, 22, 24), CAR)
        self.shape("rectangle", [(x - w, y - h * 0.85), (x + w, y - h * 0.15)], body, CAR)
        roof = [
            (x - w * 0.8, y - h * 0.8),
            (x - w * 0.6, y - h * 1.45),
            (x + w * 0.6, y - h * 1.45),
            (x + w * 0.8, y - h * 0.8),
        ]
        self.shape("polygon", roof, body, CAR)
        glass = [
            (x - w * 0.64, y - h * 0.85),
            (x - w * 0.5, y - h * 1.34),
            (x + w * 0.5, y - h * 1.34),
            (x + w * 0.64, y - h * 0.85),
        ]
        self.shape("polygon", glass, (52, 64, 80))
        lamp = self.rng.choice([(250, 238, 190), (232, 60, 44)])
        for sx in (-0.8, 0.8):
            self.shape(
                "ellipse",
                [(x + sx * w - w * 0.14, y - h * 0.72), (x + sx * w + w * 0.14, y - h * 0.45)],
                lamp,
            )

    def person(self, depth: float) -> None:
        place = self.side(0.04, 0.2) if self.rng.random() < 0.75 else self.rng.uniform(0.1, 0.9)
        x, y, h = (
            self.across(place, depth),
            self.floor(depth),
            depth * self.height * self.rng.uniform(0.62, 0.72),
        )
        w = h * 0.14
        self.shadow(x, y, w * 1.6)
        legs, coat = self.varied((44, 46, 74)), self.varied(
            self.rng.choice([(222, 80, 160), (240, 140, 40), (150, 70, 200), (230, 70, 90)])
        )  # fmt: skip
        stride = self.rng.uniform(0.3, 0.8) * w
        for sx in (-1, 1):
            leg = [
                (x - w * 0.45, y - h * 0.48),
                (x + w * 0.45, y - h * 0.48),
                (x + sx * stride + w * 0.4, y),
                (x + sx * stride - w * 0.4, y),
            ]
            self.shape("polygon", leg, legs, PERSON)
        self.shape("ellipse", [(x - w * 1.05, y - h * 0.86), (x + w * 1.05, y - h * 0.38)], coat, PERSON)
        skin = self.varied(self.rng.choice([(236, 196, 164), (190, 138, 104), (120, 84, 62)]))
        self.shape("ellipse", [(x - w * 0.58, y - h), (x + w * 0.58, y - h * 0.8)], skin, PERSON)

    def sign(self, depth: float) -> None:
        x, y, h = self.across(self.side(0.05, 0.24), depth), self.floor(depth), depth * self.height * 0.85
        r = h * self.rng.uniform(0.17, 0.2)
        self.shape("rectangle", [(x - h * 0.025, y - h + r), (x + h * 0.025, y)], (150, 152, 158), SIGN)
        cy, kind = y - h + r, self.rng.choice(["stop", "yield", "blue"])
        if kind == "yield":
            for k, colour in ((1.15, (226, 30, 34)), (0.62, (250, 246, 236))):
                points = [(x - r * k, cy - r * k * 0.8), (x + r * k, cy - r * k * 0.8), (x, cy + r * k)]
                self.shape("polygon", points, colour, SIGN)
            return
        outer, inner = (
            ((226, 30, 34), (250, 246, 236)) if kind == "stop" else ((28, 86, 214), (246, 248, 252))
        )
        self.shape("ellipse", [(x - r, cy - r), (x + r, cy + r)], outer, SIGN)
        self.shape("rectangle", [(x - r * 0.6, cy - r * 0.22), (x + r * 0.6, cy + r * 0.22)], inner, SIGN)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        mask = np.asarray(self.mask)[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE]
        return np.asarray(self.image.reduce(_FINE)), np.ascontiguousarray(mask)


def _light(image: np.ndarray, mask: np.ndarray, rng: random.Random) -> np.ndarray:
    """Brightness, colour cast, a gradient across the picture, and texture by class."""
    height, width = mask.shape
    warm = rng.uniform(-0.1, 0.1)
    cast = rng.uniform(0.68, 1.15) * np.array([1 + warm, 1, 1 - warm], np.float32)
    tilt = np.float32(rng.uniform(-0.18, 0.18)) * np.linspace(-1, 1, width, dtype=np.float32)
    noise = np.random.RandomState(rng.getrandbits(32)).standard_normal((height, width, 1)).astype(np.float32)
    lit = image * cast * (1 + tilt)[None, :, None] + noise * _TEXTURE[mask][..., None]
    return np.clip(lit, 0, 255).astype(np.uint8)


def _dusk(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """Paler colours, darker above than below, a blue cast, and noise that hides fine texture."""
    height, width = image.shape[:2]
    grey = image.mean(axis=2, keepdims=True, dtype=np.float32)
    pale = grey + 0.55 * (image - grey)
    cast = rng.uniform(0.36, 0.52) * np.array([0.7, 0.85, 1.3], np.float32)
    fall = np.linspace(0.8, 1.2, height, dtype=np.float32)[:, None, None]
    noise = np.random.RandomState(rng.getrandbits(32)).standard_normal((height, width, 3)).astype(np.float32)
    return np.clip(pale * cast * fall + 7 * noise, 0, 255).astype(np.uint8)
