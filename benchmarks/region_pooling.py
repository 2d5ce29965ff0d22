"""RoIAlign's backward pass on a CPU, torchvision's and this library's in turns: processor time of one thread, largest difference.

uv run python benchmarks/region_pooling.py
"""

import statistics
import time

import torch
from torch import Tensor
from torchvision.ops import roi_align

from detdistill.functional.region_pooling import pool_rois

CASES = ((8, 64, 12, 12, 600, 2), (8, 64, 12, 12, 600, 0), (2, 256, 50, 68, 256, 0), (2, 256, 100, 136, 1024, 0))
"""Images, channels, rows, columns, boxes, samples along a side of a bin (0: as many as cells)."""
STRIDE = 8
ROUNDS = 5


def boxes(images: int, rows: int, columns: int, count: int) -> Tensor:
    """Random boxes of up to 220 pixels, or of two fifths of a small image."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([columns, rows]) * float(STRIDE)
    corners = torch.rand(count, 2, generator=generator) * size * 0.6
    sides = torch.rand(count, 2, generator=generator) * (size * 0.4).clamp(max=200.0) + 10
    return torch.cat([torch.randint(0, images, (count, 1), generator=generator), corners, corners + sides], dim=1)


def main() -> None:
    torch.set_num_threads(1)
    for images, channels, rows, columns, count, samples in CASES:
        given, rois = torch.rand(images, channels, rows, columns), boxes(images, rows, columns, count)
        seconds: dict[str, list[float]] = {"torchvision": [], "here": []}
        gradients: dict[str, Tensor] = {}
        for _ in range(ROUNDS):
            for name, pool in (("torchvision", roi_align), ("here", pool_rois)):
                maps = given.clone().requires_grad_()
                pooled = pool(maps, rois, 7, 1 / STRIDE, samples, True)
                begun = time.process_time()
                pooled.backward(torch.ones_like(pooled))
                seconds[name].append(time.process_time() - begun)
                assert maps.grad is not None
                gradients[name] = maps.grad
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        ratio = statistics.median(a / b for a, b in zip(seconds["here"], seconds["torchvision"], strict=True))
        difference = float((gradients["here"] - gradients["torchvision"]).abs().max() / gradients["torchvision"].abs().max())
        shown = ", ".join(f"{name} {value:.4f} s" for name, value in medians.items())
        what = f"{images}x{channels}x{rows}x{columns}, {count} boxes, {samples} samples"
        print(f"{what}: {shown}, ratio {ratio:.2f}, {difference:.0e}")


if __name__ == "__main__":
    main()
