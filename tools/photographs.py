#!/usr/bin/env python3
"""Patches of the sample photographs of scikit-image: OUT/train and OUT/test, each from pictures that the other has not.

    pip install scikit-image
    python tools/photographs.py OUT
"""
import argparse
import pathlib

import numpy as np
from skimage import color, data, io

TRAIN = ["astronaut", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "camera", "brick", "grass", "gravel", "moon", "stereo_motorcycle"]
TEST = ["chelsea", "rocket"]


def pictures(name):
    found = getattr(data, name)()
    # A stereo pair comes with its disparities, which are no picture.
    for picture in found[:2] if isinstance(found, tuple) else [found]:
        yield picture[..., :3] if picture.ndim == 3 else (color.gray2rgb(picture))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--side", type=int, default=64, help="of a patch, in pixels")
    parser.add_argument("--stride", type=int, default=48, help="from one patch to the next, in pixels")
    options = parser.parse_args()
    for part, names in [("train", TRAIN), ("test", TEST)]:
        folder = options.out / part
        folder.mkdir(parents=True, exist_ok=True)
        count = 0
        for name in names:
            for i, picture in enumerate(pictures(name)):
                picture = np.ascontiguousarray(picture, dtype=np.uint8)
                height, width = picture.shape[:2]
                for y in range(0, height - options.side + 1, options.stride):
                    for x in range(0, width - options.side + 1, options.stride):
                        patch = picture[y : y + options.side, x : x + options.side]
                        io.imsave(folder / f"{name}-{i}-{y:04}-{x:04}.png", patch, check_contrast=False)
                        count += 1
        print(f"{folder}: {count} patches of {options.side}x{options.side}")


if __name__ == "__main__":
    main()
