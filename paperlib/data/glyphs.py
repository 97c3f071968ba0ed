"""glyphs100: a small image data set with 100 labels that needs no download.

Each image is one character (digit, Latin, Greek or symbol) from the fonts that ship with matplotlib: light on dark, in
random colours, pose and stroke weight, over a smooth random texture and pixel noise. The test faces are never trained
on. Some labels look alike on purpose (O/0/o, l/1/I, v/ν, p/ρ), but no two have the same mask in any face. What it shows
is a demonstration that the code works, not evidence about a model.
"""

import string
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Greek capitals and omicron that repeat a Latin outline are left out.
CLASSES = string.digits + string.ascii_uppercase + string.ascii_lowercase
CLASSES += "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρςστυφχψω&#%?"
TRAIN_FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
)  # fmt: skip
TEST_FACES = ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta")

MASK_SIZE = 96  # pixels per side of a stored mask, which spans the image at scale 1
MASK_BLUR = 2.5  # mask pixels; turns the outline into a slope that can be cut at any level
CAP_HEIGHT = 0.52  # height of "H" in every face, as a fraction of the image side
BASELINE = 0.7  # distance of the baseline from the top edge, same unit

# Difficulty: each image draws uniformly from these ranges.
ROTATION = (-15.0, 15.0)  # degrees
SCALE = (0.6, 1.1)
SHEAR = (-0.15, 0.15)
SHIFT = (-0.08, 0.08)  # fraction of the image side, across and down
CUT_LEVEL = (0.25, 0.6)  # of the blurred mask: a low level gives thick strokes, a high level thin
MIN_CONTRAST = 0.5  # smallest gap between the grey levels of character and background, in 0..1
TEXTURE = (0.0, 0.12)  # standard deviation of the background texture
TEXTURE_NODES = 5  # per side
NOISE = (0.0, 0.08)  # standard deviation of the pixel noise


def _masks(faces: tuple[str, ...]) -> torch.Tensor:
    """Blurred uint8 masks (faces, labels, MASK_SIZE, MASK_SIZE), all on one baseline."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = np.empty((len(faces), len(CLASSES), MASK_SIZE, MASK_SIZE), dtype=np.uint8)
    where = (MASK_SIZE / 2, BASELINE * MASK_SIZE)
    for face, name in enumerate(faces):
        # Basic layout, because Pillow's other engine is optional and may place glyphs differently.
        # Each face is measured at a large size, to give all of them one cap height.
        layout = ImageFont.Layout.BASIC
        font = ImageFont.truetype(folder / f"{name}.ttf", 1000, layout_engine=layout)
        cap = -font.getbbox("H", anchor="ls")[1] / 1000
        font = font.font_variant(size=round(CAP_HEIGHT * MASK_SIZE / cap))
        seen = set()
        # U+FFFF is never a character: it draws the box that stands for a missing glyph.
        for label, char in enumerate((*CLASSES, "\uffff")):
            image = Image.new("L", (MASK_SIZE, MASK_SIZE))
            ImageDraw.Draw(image).text(where, char, fill=255, font=font, anchor="ms")
            seen.add(image.tobytes())
            if label < len(CLASSES):
                masks[face, label] = image.filter(ImageFilter.GaussianBlur(MASK_BLUR))
        if len(seen) <= len(CLASSES):
            raise RuntimeError(f"font face {name} lacks a character or draws two of them alike")
    return torch.from_numpy(masks)


def _paint(masks: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Pose and colour a chunk of masks (n, MASK_SIZE, MASK_SIZE): uint8 (n, size, size, 3)."""
    n = len(masks)

    def uniform(limits: tuple[float, float], *shape: int) -> torch.Tensor:
        return limits[0] + (limits[1] - limits[0]) * torch.rand(n, *shape, generator=generator)

    # Small images are posed at twice their size and averaged down, against jagged edges. The grid is written out
    # element by element: a matrix product (as in affine_grid) could round differently with another number of threads.
    over = 2 if size < 64 else 1
    line = (2 * torch.arange(size * over) + 1) / (size * over) - 1
    angle, scale = torch.deg2rad(uniform(ROTATION, 1, 1)), uniform(SCALE, 1, 1)
    x = (line - 2 * uniform(SHIFT, 1, 1)) / scale
    y = (line[:, None] - 2 * uniform(SHIFT, 1, 1)) / scale
    down = angle.cos() * y - angle.sin() * x
    across = angle.cos() * x + angle.sin() * y + uniform(SHEAR, 1, 1) * down
    grid = torch.stack((across, down), dim=-1)
    ink = F.grid_sample(masks[:, None].float() / 255, grid, align_corners=False)
    # An edge about one output pixel wide, but at least so steep that bare background gets no ink at any level.
    gain = max(0.5 / CUT_LEVEL[0], 2.5 * MASK_BLUR * size / MASK_SIZE)
    ink = F.avg_pool2d(((ink - uniform(CUT_LEVEL, 1, 1, 1)) * gain + 0.5).clamp(0, 1), over)

    # Light on dark only: with both polarities a small transformer needs more than a minute to get above chance. The
    # tint sums to zero over the channels and vanishes at black and white, so no grey level and no range changes.
    dark = uniform((0, 1 - MIN_CONTRAST), 1, 1, 1)
    light = dark + MIN_CONTRAST + (1 - MIN_CONTRAST - dark) * uniform((0, 1), 1, 1, 1)
    tint = uniform((0, 1), 2, 3, 1, 1)
    tint = tint - tint.roll(1, dims=2)
    back = dark + torch.minimum(dark, 1 - dark) * tint[:, 0]
    front = light + torch.minimum(light, 1 - light) * tint[:, 1]
    texture = torch.randn(n, 3, TEXTURE_NODES, TEXTURE_NODES, generator=generator)
    texture = F.interpolate(texture, size=(size, size), mode="bicubic", align_corners=True)
    back = back + uniform(TEXTURE, 1, 1, 1) * texture
    noise = torch.randn(n, 3, size, size, generator=generator)
    image = back + ink * (front - back) + uniform(NOISE, 1, 1, 1) * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _split(faces: tuple[str, ...], size: int, per_label: int, seed: int) -> tuple[np.ndarray, ...]:
    """Images and labels of one split, in random order; faces take turns within a label."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(CLASSES) * per_label, generator=generator)
    label, face = order // per_label, order % per_label % len(faces)
    masks, images = _masks(faces), np.empty((len(order), size, size, 3), dtype=np.uint8)
    # Chunks bound the memory, and are too short for torch to share their sines among threads, which could round
    # differently.
    step = max(1, min(512, 2**20 // size**2))
    for start in range(0, len(order), step):
        part = slice(start, start + step)
        images[part] = _paint(masks[face[part], label[part]], size, generator).numpy()
    return images, label.to(torch.uint8).numpy()


def draw(
    image_size: int = 32, train_per_label: int = 40, test_per_label: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Draw the data set: x_train (n, S, S, 3) uint8, y_train (n,) uint8 in 0..99, x_test, y_test, 100 label names.

    image_size S is 16 to 224 pixels, n 100 * train_per_label; a label's name is its character. Both splits are shuffled
    and have the same number of images per label. The same arguments (seed 0 to 2**31 - 1) give the same arrays with any
    number of threads; neither split depends on the number of images in the other. Raises ValueError for an argument out
    of range, RuntimeError for a font face that lacks a character or draws two of them alike.
    """
    if not 16 <= image_size <= 224:
        raise ValueError(f"image_size must be in 16..224, got {image_size}")
    if min(train_per_label, test_per_label) < 1:
        raise ValueError("train_per_label and test_per_label must be at least 1")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be in 0..2**31 - 1, got {seed}")
    # Even and odd seeds keep the random streams of the two splits apart.
    x_train, y_train = _split(TRAIN_FACES, image_size, train_per_label, 2 * seed)
    x_test, y_test = _split(TEST_FACES, image_size, test_per_label, 2 * seed + 1)
    return x_train, y_train, x_test, y_test, list(CLASSES)
