"""Crop, RandAugment and erasing of CCT's recipe for a whole batch at once, on the batch's device.

Every image draws its own crop, operations, magnitudes, signs and rectangle, as in timm's rand-m9-mstd0.5-inc1; the
numbers are drawn on the CPU, from torch's global generator, so that nothing waits for the device; noise, which would be
much to copy, is drawn there. Images are float (b, 3, S, S) of whole numbers 0..255. Sampling is bilinear (choice: timm
draws bilinear or bicubic).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAGNITUDE, SPREAD, LARGEST = 9.0, 0.5, 10.0  # of an operation, its deviation, and its bound
DONE = 0.5  # probability of each of an image's operations
ATTEMPTS = 10  # at a box that fits into the image
GREY = (19595, 38470, 7471)  # PIL's weights of red, green and blue, over 2**16


def crop_and_mirror(images: Tensor) -> Tensor:
    """A random box of 80 to 100 % of the area, sides up to 4 : 3, stretched to the whole; mirrored half of the time."""
    n, size = len(images), images.shape[-1]
    top, left, height, width, fits = _boxes(n, size, (0.8, 1.0), (3 / 4, 4 / 3))
    top, left = top.where(fits, 0), left.where(fits, 0)
    height, width = height.where(fits, size), width.where(fits, size)
    mirrored = torch.rand(n) < 0.5
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = torch.where(mirrored, -width, width) / size
    matrix[:, 0, 2] = torch.where(mirrored, left + width, left)
    matrix[:, 1, 1], matrix[:, 1, 2] = height / size, top
    return _resampled(images, matrix)


def rand_augment(images: Tensor, fill: Tensor, count: int = 2) -> Tensor:
    """`count` operations an image, each drawn from `OPERATIONS` and left out half of the time; fill (3, 1, 1), 0..255,
    is put where an operation leaves a pixel empty."""
    for _ in range(count):
        chosen = torch.randint(len(OPERATIONS), (len(images),))
        chosen = chosen.where(torch.rand(len(images)) < DONE, -1)
        level = (MAGNITUDE + SPREAD * torch.randn(len(images))).clamp(0, LARGEST) / LARGEST
        sign = torch.randint(2, (len(images),)) * 2 - 1
        images = operate(images, chosen, level * sign, fill)
    return images


def operate(images: Tensor, chosen: Tensor, levels: Tensor, fill: Tensor) -> Tensor:
    """Apply to each image the operation of `OPERATIONS` that `chosen` (b,) numbers, -1 for none, with its level (b,),
    -1..1; operations without a direction take its size. Both on the CPU."""
    result = images.clone()
    for number, operation in enumerate(OPERATIONS.values()):
        where = (chosen == number).nonzero()[:, 0]
        if len(where):
            index = where.to(images.device, non_blocking=True)
            changed = operation(images[index], levels[where], fill)
            result[index] = changed.round().clamp(0, 255)
    return result


def erase(images: Tensor, share: float = 0.25) -> Tensor:
    """Normalised images of which a share has a random box of 2 to 33 % of the area, sides up to 10 : 3, in noise."""
    size = images.shape[-1]
    top, left, height, width, fits = _boxes(len(images), size, (0.02, 1 / 3), (0.3, 3.3))
    drawn = fits & (torch.rand(len(images)) < share)
    pixel = torch.arange(size)
    rows = (pixel >= top[:, None]) & (pixel < (top + height)[:, None])
    columns = (pixel >= left[:, None]) & (pixel < (left + width)[:, None])
    box = (rows[:, :, None] & columns[:, None] & drawn[:, None, None])[:, None].to(images.device, non_blocking=True)
    return torch.randn(images.shape, device=images.device).where(box, images)


def _boxes(n: int, size: int, area: tuple[float, float], ratio: tuple[float, float]) -> tuple[Tensor, ...]:
    """Top, left, height and width of random boxes in a square, float (n,), and whether one of the attempts fits."""
    share = torch.empty(ATTEMPTS, n).uniform_(*area)
    sides = torch.empty(ATTEMPTS, n).uniform_(*(math.log(bound) for bound in ratio)).exp()
    height, width = (share / sides).sqrt().mul(size).round(), (share * sides).sqrt().mul(size).round()
    fit = (height <= size) & (width <= size) & (height > 0) & (width > 0)
    first = fit.int().argmax(dim=0, keepdim=True)
    height, width = (side.gather(0, first)[0].clamp(max=size) for side in (height, width))
    top, left = (torch.rand(n).mul(size - side + 1).floor() for side in (height, width))
    return top, left, height, width, fit.any(dim=0)


def _resampled(images: Tensor, matrix: Tensor, fill: Tensor | None = None) -> Tensor:
    """Pixel (x, y) of the result is that at matrix (b, 2, 3) times (x, y, 1) of the image, both counted from the corner
    of an image and pixels' centres at 0.5 (as PIL does); outside is fill, or the nearest pixel."""
    size = images.shape[-1]
    theta = matrix.clone()  # the same for coordinates that run from -1 to 1
    theta[:, :, 2] = matrix[:, :, :2].sum(dim=2) + 2 * matrix[:, :, 2] / size - 1
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    if fill is None:
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False).round()
    return (F.grid_sample(images - fill, grid, align_corners=False) + fill).round()


# --- operations: images (b, 3, S, S), levels (b,) in -1..1 on the CPU, fill -> images


def _geometric(entries: Callable[[Tensor, int], dict[tuple[int, int], Tensor]]) -> Callable:
    def operation(images: Tensor, levels: Tensor, fill: Tensor) -> Tensor:
        matrix = torch.eye(2, 3).repeat(len(images), 1, 1)
        for (row, column), value in entries(levels, images.shape[-1]).items():
            matrix[:, row, column] = value
        return _resampled(images, matrix, fill)

    return operation


def _rotation(levels: Tensor, size: int) -> dict[tuple[int, int], Tensor]:
    """Up to 30 degrees about the centre."""
    cosine, sine, half = (levels * math.pi / 6).cos(), (levels * math.pi / 6).sin(), size / 2
    turn = {(0, 0): cosine, (0, 1): -sine, (1, 0): sine, (1, 1): cosine}
    return turn | {(0, 2): half * (1 - cosine + sine), (1, 2): half * (1 - cosine - sine)}


def _blended(other: Callable[[Tensor], Tensor]) -> Callable:
    """The image moved away from, or towards, a version of itself: factor 1 +- 0.9 level, at least 0.1."""

    def operation(images: Tensor, levels: Tensor, _) -> Tensor:
        factor = (1 + 0.9 * levels).clamp(min=0.1).to(images.device, non_blocking=True)[:, None, None, None]
        plain = other(images)
        return plain + factor * (images - plain)

    return operation


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)  # a tensor of the weights would have to be copied to the device
    return ((GREY[0] * red + GREY[1] * green + GREY[2] * blue) / 2**16).round()


def _smooth(images: Tensor) -> Tensor:
    """PIL's smoothing filter: a pixel counts 5, its neighbours 1; the outermost pixels are left alone."""
    result = images.clone()
    inner = result[:, :, 1:-1, 1:-1]
    inner.copy_(((F.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4 * inner) / 13).round())
    return result


def _auto_contrast(images: Tensor, *_) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, ((images - low) * 255 / (high - low).clamp(min=1)).floor(), images)


def _equalize(images: Tensor, *_) -> Tensor:
    """Each channel's values spread so that they are as frequent (PIL)."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, device=images.device).scatter_add_(
        2, flat, torch.ones_like(flat).float()
    )
    last = counts.gather(2, flat.amax(dim=2, keepdim=True))
    step = ((flat.shape[2] - last) / 255).floor()
    table = ((counts.cumsum(dim=2) - counts + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    return torch.where(step[..., None] > 0, table.gather(2, flat).unflatten(2, images.shape[2:]), images)


def _posterize(images: Tensor, levels: Tensor, _) -> Tensor:
    """4 - int(4 level) bits are kept."""
    width = 2.0 ** (4 + (4 * levels.abs()).floor()).to(images.device, non_blocking=True)[:, None, None, None]
    return (images / width).floor() * width


def _solarize(images: Tensor, levels: Tensor, _) -> Tensor:
    """What is as bright as 256 - 256 level, or brighter, is inverted."""
    threshold = (256 - (256 * levels.abs()).floor()).to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, levels: Tensor, _) -> Tensor:
    """The darker half becomes brighter by 110 level."""
    more = (110 * levels.abs()).floor().to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(images < 128, images + more, images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda images, *_: 255 - images,
    "rotate": _geometric(_rotation),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _blended(_grey),
    "contrast": _blended(lambda images: _grey(images).mean(dim=(2, 3), keepdim=True).round()),
    "brightness": _blended(torch.zeros_like),
    "sharpness": _blended(_smooth),
    "shear_x": _geometric(lambda levels, size: {(0, 1): 0.3 * levels}),
    "shear_y": _geometric(lambda levels, size: {(1, 0): 0.3 * levels}),
    "translate_x": _geometric(lambda levels, size: {(0, 2): 0.45 * levels * size}),
    "translate_y": _geometric(lambda levels, size: {(1, 2): 0.45 * levels * size}),
}
